// The run nearest to the pointer, or to the finger, in words under its picture. Without scripts a point has its title.
for (const figure of document.querySelectorAll("figure:has(.points)")) {
  const told = figure.querySelector("output");
  told.textContent = "Point at a mark, or tap it, to read it here.";
  for (const svg of figure.querySelectorAll("svg")) {
    const marks = [...svg.querySelectorAll(".points use")];
    const points = marks.map((mark) => [+mark.getAttribute("x"), +mark.getAttribute("y"), mark.textContent]);
    const tell = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let [nearest, least] = ["", 15];
      for (const [x, y, words] of points) {
        const distance = Math.hypot(x - place.x, y - place.y);
        if (distance < least) [nearest, least] = [words, distance];
      }
      if (nearest) [told.textContent, told.className] = [nearest, "told"];
    };
    svg.addEventListener("pointermove", tell);
    svg.addEventListener("click", tell);
  }
}


// The page is complete without this: the field that it serves is hidden until it runs.
const field = document.getElementById("search"), found = document.getElementById("found");
const samples = [...document.querySelectorAll(".sample")];
const texts = samples.map(sample => sample.textContent.toLowerCase());
field.hidden = false;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  samples.forEach((sample, at) => {
    sample.hidden = !words.every(word => texts[at].includes(word));
    shown += !sample.hidden;
  });
  found.textContent = words.length ? `${shown} of ${samples.length} shown.` : "";
});

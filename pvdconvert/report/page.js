"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  document.documentElement.classList.add("js");

  const box = document.getElementById("compare");
  if (box) {
    const first = box.querySelector("[name=first]"), second = box.querySelector("[name=second]");
    const flip = box.querySelector(".flip"), slide = box.querySelector(".slide .frame");
    const show = () => {
      const thumb = box.querySelector('.thumb[aria-pressed="true"]');
      const names = [first, second].map((s) => s.selectedOptions[0].textContent);
      const source = (who) => {
        const image = thumb.querySelector(`[data-kind="${box.dataset.kind}"][data-who="${who.value}"]`);
        return image ? image.src : null;
      };
      const sources = [source(first), source(second)];
      [".one", ".two"].forEach((kind, k) => all(kind, box).forEach((image) => {
        if (sources[k]) image.src = sources[k];
        else image.removeAttribute("src");
        image.alt = names[k];
      }));
      all(".first-name", box).forEach((tag) => { tag.textContent = names[0]; });
      all(".second-name", box).forEach((tag) => { tag.textContent = names[1]; });
      box.querySelector(".flip-name").textContent = names[flip.classList.contains("turned") ? 1 : 0];
      box.classList.toggle("alone", !(sources[0] && sources[1]));
      box.style.setProperty("--aspect", thumb.dataset.aspect);
      box.querySelector(".near").textContent = thumb.dataset.near || "";
      box.querySelector(".far").textContent = thumb.dataset.far || "";
      box.querySelector(".which").textContent = thumb.dataset.name;
    };
    const press = (button, buttons) => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
    for (const what of ["mode", "kind"]) {
      const buttons = all(`[data-set-${what}]`, box);
      buttons.forEach((b) => b.addEventListener("click", () => {
        press(b, buttons);
        box.dataset[what] = b.getAttribute(`data-set-${what}`);
        show();
      }));
    }
    const thumbs = all(".thumb", box);
    const pick = (thumb) => { press(thumb, thumbs); show(); };
    thumbs.forEach((t) => t.addEventListener("click", () => pick(t)));
    all("[data-goto]").forEach((link) => link.addEventListener("click", () => {
      pick(thumbs.find((t) => t.dataset.name === link.dataset.goto));
      box.scrollIntoView({ behavior: "smooth" });
    }));
    [first, second].forEach((s) => s.addEventListener("change", show));
    flip.querySelector(".frame").addEventListener("click", () => { flip.classList.toggle("turned"); show(); });

    const cut = (share) => {
      const percent = Math.min(100, Math.max(0, share * 100));
      slide.style.setProperty("--cut", `${percent}%`);
      slide.setAttribute("aria-valuenow", String(Math.round(percent)));
    };
    const follow = (event) => {
      const frame = slide.getBoundingClientRect();
      cut((event.clientX - frame.left) / frame.width);
    };
    slide.addEventListener("pointerdown", (event) => { slide.setPointerCapture(event.pointerId); follow(event); });
    slide.addEventListener("pointermove", (event) => { if (slide.hasPointerCapture(event.pointerId)) follow(event); });
    slide.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -2, ArrowRight: 2, ArrowDown: -2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 }[event.key];
      if (step) { event.preventDefault(); cut((Number(slide.getAttribute("aria-valuenow")) + step) / 100); }
    });
    const gain = box.querySelector("[name=gain]");
    const amplify = () => {
      box.style.setProperty("--gain", gain.value);
      all(".gain-value", box).forEach((o) => { o.textContent = `\u00d7${gain.value}`; });
    };
    gain.addEventListener("input", amplify);
    amplify();
    show();
  }

  all("th[data-column]").forEach((head) => head.addEventListener("click", () => {
    const table = head.closest("table"), column = Number(head.dataset.column);
    const down = head.getAttribute("aria-sort") === "ascending";
    all("th[data-column]", table).forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => column ? Number(value(a)) - Number(value(b)) : value(a).localeCompare(value(b), "en", { numeric: true });
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => (down ? order(b, a) : order(a, b))));
  }));

  all(".command button").forEach((button) => button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(text);
    }
  }));

  const raw = document.getElementById("raw");
  if (raw) raw.addEventListener("toggle", () => {
    raw.querySelector("pre").textContent = JSON.stringify(JSON.parse(document.getElementById("report").textContent), null, 2);
  });
})();

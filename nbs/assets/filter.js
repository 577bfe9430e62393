// A filter above every table inside `.filterable`: words, chapter (a tbody each), verdict. Used by results.ipynb.
(() => {
  "use strict";
  const choice = (label, all, values) => {
    const select = document.createElement("select");
    select.setAttribute("aria-label", label);
    select.append(new Option(all, ""), ...values.map((value) => new Option(value, value)));
    return select;
  };
  const start = () => {
    for (const box of document.querySelectorAll(".filterable")) {
      const groups = [...box.querySelectorAll("tbody[data-group]")];
      const rows = [...box.querySelectorAll("tr[data-verdict]")];
      if (!rows.length || box.querySelector(".filter")) continue;
      const words = document.createElement("input");
      words.type = "search";
      words.placeholder = "Filter the claims";
      words.setAttribute("aria-label", "Words that a claim must contain");
      const chapter = choice("Chapter", "all chapters", groups.map((group) => group.dataset.group));
      const verdict = choice("Verdict", "all verdicts", [...new Set(rows.map((row) => row.dataset.verdict))]);
      const count = document.createElement("output");
      const show = () => {
        const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
        let shown = 0;
        for (const group of groups) {
          const here = !chapter.value || chapter.value === group.dataset.group;
          let inside = 0;
          for (const row of group.querySelectorAll("tr[data-verdict]")) {
            const text = row.textContent.toLowerCase();
            row.hidden = !(here && (!verdict.value || verdict.value === row.dataset.verdict) && wanted.every((word) => text.includes(word)));
            inside += row.hidden ? 0 : 1;
          }
          group.hidden = !inside;
          shown += inside;
        }
        count.textContent = `${shown} of ${rows.length}`;
      };
      const bar = document.createElement("div");
      bar.className = "filter";
      bar.append(words, ...(groups.length > 1 ? [chapter] : []), verdict, count);
      words.addEventListener("input", show);
      for (const part of [chapter, verdict]) part.addEventListener("change", show);
      box.prepend(bar);
      show();
    }
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();

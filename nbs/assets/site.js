// Behaviour of the preview site (papers10.core.site): search, theme, menu, contents, copy. No request leaves the page.
(() => {
  "use strict";
  const root = document.body.dataset.root || ".";
  const input = document.getElementById("search");
  const results = document.getElementById("results");
  const index = window.SEARCH_INDEX || [];
  const fold = (text) => text.normalize("NFD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const prepared = index.map((entry) => ({ ...entry, title: fold(entry.t), heading: fold(entry.h), text: fold(entry.x) }));

  const score = (entry, words) => {
    let total = 0;
    for (const word of words) {
      const inHeading = entry.heading.includes(word), inTitle = entry.title.includes(word);
      const hits = entry.text.split(word).length - 1;
      if (!inHeading && !inTitle && !hits) return 0;
      total += (inHeading ? 12 : 0) + (entry.heading === word ? 20 : 0) + (inTitle ? (entry.h ? 3 : 14) : 0) + Math.min(hits, 5);
    }
    return total;
  };

  const marked = (text, words) => {
    const fragment = document.createDocumentFragment();
    const lower = fold(text);
    if (lower.length !== text.length) { fragment.append(text); return fragment; }
    let at = 0;
    while (at < text.length) {
      let next = -1, length = 0;
      for (const word of words) {
        const found = lower.indexOf(word, at);
        if (found >= 0 && (next < 0 || found < next)) { next = found; length = word.length; }
      }
      if (next < 0) break;
      fragment.append(text.slice(at, next));
      const mark = document.createElement("mark");
      mark.textContent = text.slice(next, next + length);
      fragment.append(mark);
      at = next + length;
    }
    fragment.append(text.slice(at));
    return fragment;
  };

  const excerpt = (entry, words) => {
    const first = Math.min(...words.map((word) => entry.text.indexOf(word)).filter((at) => at >= 0));
    if (!Number.isFinite(first)) return entry.x.slice(0, 150);
    const start = Math.max(0, first - 60);
    return (start ? "…" : "") + entry.x.slice(start, start + 170) + (start + 170 < entry.x.length ? "…" : "");
  };

  let chosen = -1;
  const choose = (next) => {
    const links = [...results.querySelectorAll("a")];
    if (!links.length) return;
    chosen = (next + links.length) % links.length;
    links.forEach((link, at) => link.setAttribute("aria-selected", String(at === chosen)));
    links[chosen].scrollIntoView({ block: "nearest" });
  };

  const show = () => {
    const words = fold(input.value).split(/\s+/).filter(Boolean);
    results.replaceChildren();
    chosen = -1;
    results.hidden = !words.length;
    if (!words.length) return;
    const found = prepared.map((entry) => [score(entry, words), entry]).filter(([points]) => points > 0)
      .sort((a, b) => b[0] - a[0]).slice(0, 12);
    for (const [, entry] of found) {
      const link = document.createElement("a");
      link.href = `${root}/${entry.u}`;
      link.setAttribute("role", "option");
      const name = document.createElement("strong");
      name.append(marked(entry.h || entry.t, words));
      link.append(name);
      if (entry.h) { const page = document.createElement("span"); page.textContent = entry.t; link.append(page); }
      const line = document.createElement("p");
      line.append(marked(excerpt(entry, words), words));
      link.append(line);
      results.append(link);
    }
    if (!found.length) {
      const none = document.createElement("div");
      none.className = "none";
      none.textContent = `Nothing found for “${input.value.trim()}”.`;
      results.append(none);
    }
    choose(0);
  };

  input.addEventListener("input", show);
  input.addEventListener("focus", show);
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") { event.preventDefault(); choose(chosen + 1); }
    else if (event.key === "ArrowUp") { event.preventDefault(); choose(chosen - 1); }
    else if (event.key === "Enter") { const link = results.querySelectorAll("a")[Math.max(chosen, 0)]; if (link) { link.click(); results.hidden = true; } }
    else if (event.key === "Escape") { results.hidden = true; input.blur(); }
  });
  document.addEventListener("click", (event) => { if (!event.target.closest(".search")) results.hidden = true; });
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing) { event.preventDefault(); input.focus(); }
  });

  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme === "dark" ||
      (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch (error) { /* private window */ }
  });

  const menu = document.getElementById("menu"), pages = document.getElementById("pages");
  menu.addEventListener("click", () => menu.setAttribute("aria-expanded", String(pages.classList.toggle("open"))));
  const current = pages.querySelector("[aria-current]");
  if (current && current.offsetTop > pages.clientHeight) pages.scrollTop = current.offsetTop - pages.clientHeight / 2;

  const contents = document.querySelector(".contents");
  if (contents) {
    const links = new Map([...contents.querySelectorAll("a")].map((link) => [decodeURIComponent(link.hash.slice(1)), link]));
    const headings = [...links.keys()].map((id) => document.getElementById(id)).filter(Boolean);
    const follow = () => {
      let active = null;
      for (const heading of headings) if (heading.getBoundingClientRect().top < 120) active = heading;
      links.forEach((link, id) => link.classList.toggle("current", Boolean(active) && id === active.id));
    };
    addEventListener("scroll", follow, { passive: true });
    follow();
  }

  if (navigator.clipboard) {
    for (const block of document.querySelectorAll("main div.sourceCode")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "Copy";
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(block.querySelector("code").innerText);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
      block.append(button);
    }
  }
})();

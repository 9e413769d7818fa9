// Markdown to DOM nodes, for answers of a model: text is never taken for HTML.

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|\[([^\]]+)\]\((https?:[^)\s]+)\)/g;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

/** Nodes of a line: code, bold, italics, links. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    const [, , code, bold, italic, label, address] = match;
    if (code !== undefined) nodes.push(element("code", code.trim()));
    else if (bold !== undefined) nodes.push(element("strong", ...inline(bold)));
    else if (italic !== undefined) nodes.push(element("em", ...inline(italic)));
    else {
      const link = element("a", label);
      link.href = address;
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      nodes.push(link);
    }
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

function codeBlock(lines, language) {
  const code = element("code", lines.join("\n"));
  if (language) code.dataset.language = language;
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.className = "plain";
  copy.addEventListener("click", () => navigator.clipboard?.writeText(code.textContent));
  return element("div", element("pre", code), copy);
}

function list(lines, name, marker) {
  const items = [];
  for (const line of lines) {
    if (marker.test(line)) items.push([line.replace(marker, "")]);
    else items.at(-1).push(line.trim());
  }
  return element(name, ...items.map((item) => element("li", ...inline(item.join(" ")))));
}

function table(lines) {
  const cells = (line) => line.replace(/^\s*\||\|\s*$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) => element("tr", ...cells(line).map((c) => element(name, ...inline(c))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return element("table", element("thead", row(lines[0], "th")), element("tbody", ...body));
}

/** Take lines from the front while they fit. */
function taken(lines, fits) {
  const count = lines.findIndex((line, index) => !fits(line, index));
  return lines.splice(0, count < 0 ? lines.length : count);
}

/** The nodes of a text; one that is cut off in a code block shows as one that ends there. */
export function render(text) {
  const lines = text.split("\n");
  const nodes = [];
  while (lines.length) {
    const line = lines[0];
    const fence = line.match(/^\s*(```+|~~~+)\s*([\w+-]*)/);
    const heading = line.match(/^(#{1,6})\s+(.*)/);
    if (fence) {
      lines.shift();
      const code = taken(lines, (l) => !l.trim().startsWith(fence[1]));
      lines.shift();
      nodes.push(codeBlock(code, fence[2]));
    } else if (heading) {
      lines.shift();
      nodes.push(element(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2])));
    } else if (/^\s*[-*+]\s+/.test(line)) {
      nodes.push(list(taken(lines, (l) => /^\s*[-*+]\s+|^\s{2,}\S/.test(l)), "ul", /^\s*[-*+]\s+/));
    } else if (/^\s*\d+[.)]\s+/.test(line)) {
      const items = taken(lines, (l) => /^\s*\d+[.)]\s+|^\s{2,}\S/.test(l));
      nodes.push(list(items, "ol", /^\s*\d+[.)]\s+/));
    } else if (/^\s*>/.test(line)) {
      const quoted = taken(lines, (l) => /^\s*>/.test(l)).map((l) => l.replace(/^\s*>\s?/, ""));
      nodes.push(element("blockquote", ...render(quoted.join("\n"))));
    } else if (line.includes("|") && /^\s*\|?[\s:|-]+\|?\s*$/.test(lines[1] ?? "") && lines[1].includes("-")) {
      nodes.push(table(taken(lines, (l) => l.includes("|"))));
    } else if (!line.trim()) {
      lines.shift();
    } else {
      const paragraph = taken(lines, (l, i) => i === 0 || (l.trim() && !/^\s*(```|~~~|#{1,6}\s|>|[-*+]\s|\d+[.)]\s)/.test(l)));
      const parts = paragraph.flatMap((l, i) => (i ? [document.createElement("br"), ...inline(l)] : inline(l)));
      nodes.push(element("p", ...parts));
    }
  }
  return nodes;
}

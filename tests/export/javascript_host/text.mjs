// Prompts into token ids, by docs/host_program.md "Text".
//
// It decodes the commonest named entities only, and repairs no wrongly decoded text: both need longer tables than this file has.

const WORD = "\\p{L}\\p{N}_";
const SPACE = "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const EDGE = `(?:(?<=[${WORD}])(?![${WORD}])|(?<![${WORD}])(?=[${WORD}]))`;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "\u00a9", reg: "\u00ae" };

// JavaScript's \w, \d and \b know ASCII only, and it has no possessive quantifiers: an expression of the page in its words.
function expression(source, flags = "gu") {
  let made = "", inside = false;
  for (let i = 0; i < source.length; i++) {
    const pair = source.slice(i, i + 2), sign = source[i];
    if (pair[0] === "\\") {
      i++;
      const classes = { w: WORD, d: "\\p{Nd}", s: SPACE };
      const outside = { S: `[^${SPACE}]`, D: "\\P{Nd}", b: EDGE };
      if (inside && pair === "\\W") made += "\\s\\S"; // only in [\w\W]: anything
      else if (classes[pair[1]]) made += inside ? classes[pair[1]] : `[${classes[pair[1]]}]`;
      else if (!inside && outside[pair[1]]) made += outside[pair[1]];
      else made += pair === '\\"' ? '"' : pair;
      continue;
    }
    if (sign === "[") inside = true;
    if (sign === "]") inside = false;
    made += sign;
    if (!inside && "*+?".includes(sign) && source[i + 1] === "+") i++;
  }
  return new RegExp(made, flags);
}

function parsed(lines) {
  return lines.trim().split("\n").map((line) => {
    const at = line.lastIndexOf("  ->  ");
    const replacement = line.slice(at + 6).slice(1, -1).replace("\\\\1", "$1");
    return [expression(line.slice(0, at)), replacement];
  });
}

const FIRST = parsed(String.raw`
@\w+\b  ->  ''
[\u31c0-\u9fff]+  ->  ''
[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d]+  ->  '-'
[` + "`" + String.raw`´«»“”¨]  ->  '"'
[‘’]  ->  "'"
&quot;?  ->  ''
&amp  ->  ''
\d{1,3}(?:\.\d{1,3}){3}  ->  ' '
\d:\d\d\s+$  ->  ''
\\n  ->  ' '
#\d{1,3}\b  ->  ''
#\d{5,}\b  ->  ''
\b\d{6,}\b  ->  ''`);

const SECOND = parsed(String.raw`
[\"']{2,}  ->  '"'
\.{2,}  ->  ' '
[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~()\[\]{}|\\/*]+  ->  ' '
(?<!\s)\s+\.\s+  ->  ' '`);

const THIRD = parsed(String.raw`
\b[a-zA-Z]{1,3}\d{3,15}\b  ->  ''
\b[a-zA-Z]+\d+[a-zA-Z]+\b  ->  ''
\b\d+[a-zA-Z]+\d+\b  ->  ''
(?:worldwide\s+)?(?:free\s+)?shipping  ->  ''
(?:free\s)?download(?:\sfree)?  ->  ''
\bclick\b\s(?:for|on)\s\w+  ->  ''
\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(?:\simages?)?  ->  ''
\bpage\s+\d+\b  ->  ''
\b\d*+[a-zA-Z]++\d++[a-zA-Z]++\d[a-zA-Z\d]*+\b  ->  ' '
\b\d++(?:\.\d*+)?+[x\u0445\u00d7]\d++(?:\.\d++\b|\.\b|\b)  ->  ''
\b\s+:\s+  ->  ': '
(\D[,./])\b  ->  '\\1 '
\s+  ->  ' '
^[\"']([\w\W]+)[\"']$  ->  '\\1'
^['_,\-:;]  ->  ''
['_,\-:+]$  ->  ''
^\.\S+$  ->  ''`);

const ADDRESS = String.raw`\b(?:SCHEME:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@))`;
const ADDRESSES = ["https?", "www"].map((scheme) => expression(ADDRESS.replace("SCHEME", scheme)));
const FILES = expression(String.raw`\S+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)`);
const ENDS = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "gu");

const LIGATURES = { "ĳ": "ij", "ŉ": "ʼn", "ǆ": "dž", "ǉ": "lj", "ǌ": "nj", "ǳ": "dz" };

const strip = (text) => text.replace(ENDS, "");
const substituted = (text, list) => list.reduce((all, [what, by]) => all.replace(what, by), text);

function unescaped(text) {
  return text.replace(/&(?:#x([0-9a-f]+)|#(\d+)|([a-z]+));?/gi, (all, hex, decimal, name) => {
    if (name !== undefined) return ENTITIES[name] ?? all;
    return String.fromCodePoint(hex === undefined ? Number(decimal) : parseInt(hex, 16));
  });
}

function unquoted(text) {
  const decoder = new TextDecoder();
  return text.replaceAll("+", " ").replace(/(?:%[0-9a-f]{2})+/gi, (run) =>
    decoder.decode(Uint8Array.from(run.slice(1).split("%"), (byte) => parseInt(byte, 16))),
  );
}

function withoutTags(text) {
  if (!/[<&]/.test(text)) return text;
  const bare = text
    .replace(/<!--[^]*?-->/g, "")
    .replace(/<(script|style)\b[^]*?<\/\1\s*>/gi, "")
    .replace(/<\/?[a-z][^>]*>|<[!?][^>]*>/gi, "");
  return unescaped(bare);
}

function repaired(text) {
  const plain = text
    .replace(/[ĳŉǆǉǌǳ]/g, (sign) => LIGATURES[sign])
    .replace(/[\ufb00-\ufb04\ufb06\uff01-\uffef\u3000]/g, (sign) => sign.normalize("NFKC"))
    .replaceAll("\ufb05", "\u017ft")
    .replace(/[\u02bc\u2018-\u201b]/g, "'")
    .replace(/[\u201c-\u201f]/g, '"');
  return plain.normalize("NFC");
}

export function cleaned(text) {
  text = strip(unquoted(text)).toLowerCase().replaceAll("<person>", "person");
  for (const address of ADDRESSES) text = text.replace(address, "");
  text = substituted(withoutTags(text), FIRST).replace(FILES, "");
  text = substituted(text, SECOND);
  if ((text.match(/[-_]/g) ?? []).length > 3) text = text.replace(/[-_]/g, " ");
  text = strip(unescaped(unescaped(repaired(text))));
  return strip(substituted(text, THIRD));
}

export function scored(prompt, scores) {
  const digit = (score) => (Math.abs(score) % 1 === 0.25 ? score.toFixed(2).slice(0, -1) : score.toFixed(1)); // ties go to even
  const marks = [
    ["aesthetic score:", scores.aes == null ? undefined : digit(scores.aes)],
    ["motion score:", scores.flow == null ? undefined : digit(scores.flow)],
    ["camera motion:", scores.camera_motion ?? undefined],
  ];
  for (const [label, value] of marks) {
    if (value !== undefined && !prompt.includes(label)) prompt += ` ${label} ${value}.`;
  }
  return prompt;
}

export const caption = (prompt, scores) => cleaned(cleaned(scored(prompt, scores)));

// Token ids by a tokenizer.json whose model is a list of whole words.
export class Tokenizer {
  constructor(json) {
    if (json.model.type !== "WordLevel") throw new Error(`this host has no tokens of the model ${json.model.type}`);
    this.vocabulary = new Map(Object.entries(json.model.vocab));
    this.unknown = this.vocabulary.get(json.model.unk_token);
    this.normalizers = json.normalizer.normalizers;
    this.end = this.vocabulary.get("</s>");
    this.pad = this.vocabulary.get("<pad>");
  }

  encode(text, length) {
    for (const { type, pattern, content } of this.normalizers) {
      if (type === "NFKD") text = text.normalize("NFKD");
      else if (type === "StripAccents") text = text.replace(/\p{Mn}/gu, "");
      else if (type === "Lowercase") text = text.toLowerCase();
      else if (type === "Replace") text = text.replace(new RegExp(pattern.Regex, "gu"), content);
      else throw new Error(`this host has no normaliser ${type}`);
    }
    const words = text.split(" ").filter((word) => word);
    const ids = words.map((word) => this.vocabulary.get(word) ?? this.unknown).slice(0, length - 1);
    ids.push(this.end);
    const mask = Array.from({ length }, (_, i) => (i < ids.length ? 1 : 0));
    while (ids.length < length) ids.push(this.pad);
    return { ids, mask };
  }
}

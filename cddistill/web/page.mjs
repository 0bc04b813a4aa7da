// The controls of the page, and its networks by onnxruntime-web. What they compute with is in engine.mjs.

import * as ort from "./onnxruntime-web/ort.wasm.min.mjs";
import {CONDITIONS, deepPng, fit, noises, paste, sample, tokenizer, unit} from "./engine.mjs";

const HINTS = { // by kind of condition; "metres" and "edit" are special cases of two of them
  image: "Picture",
  edit: "Picture to edit",
  sr: "Picture: it is made small first, then enlarged",
  inpaint: "Picture: paint over what shall be generated",
  depth: "Depth map, a grey picture: near is bright",
  metres: "Depth map, a grey picture of distances: far is bright, nothing is black",
  canny: "Picture, of which edges are taken; one in pure black and white, of SIZE pixels, is edges",
};
const at = (id) => document.getElementById(id);
const json = async (name) => (await fetch(name)).json();
ort.env.wasm.wasmPaths = new URL("onnxruntime-web/", import.meta.url).href;
ort.env.wasm.numThreads = crossOriginIsolated ? 0 : 1; // threads need headers that a plain server does not send

const state = {manifest: null, sessions: {}, tokens: null, picture: null, read: null, turn: 0, mask: null, busy: false};

function say(text, error = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", error);
}

// f, with its errors shown as a sentence.
const guarded = (f) => async (...given) => {
  try {
    await f(...given);
  } catch (error) {
    say(error.message, true);
  }
};

// ---- networks

// The output of a network, a typed array, for {input: typed array}.
async function run(name, given) {
  const {[name]: session} = state.sessions, spec = state.manifest.networks[name];
  const fed = session.inputNames.map((input) => [input, new ort.Tensor(spec[input].type, given[input], spec[input].shape)]);
  return (await session.run(Object.fromEntries(fed)))[session.outputNames[0]].data;
}

// What the denoiser may take of an example: texts and conditions, by name.
async function examples(cond) {
  const {text, networks} = state.manifest, values = {};
  if (text?.kind === "prompt") {
    for (const [name, words] of [["text", at("prompt").value], ["null", ""]]) {
      values[`${name}.encoder_hidden_states`] = await run("text_encoder", {input_ids: state.tokens(words)});
    }
  }
  if (text?.kind === "label") {
    values["text.class_labels"] = Int32Array.of(at("label").value);
    values["null.class_labels"] = Int32Array.of(text.labels);
  }
  if (cond) {
    values.cond = cond.data;
    values.cond_latent = networks.encoder && await run("encoder", {cond: cond.data});
  }
  return values;
}

// The image, floats in [0, 1], of the controls and a condition.
async function generated(cond) {
  const {shape, plans, networks, condition} = state.manifest, plan = plans[at("steps").value];
  const values = await examples(cond), filled = (name, x) => {
    return new Float32Array(networks.denoiser[name].shape.reduce((a, b) => a * b)).fill(x);
  };
  const call = ({t, given}, z) => {
    const taken = Object.entries(given).map(([name, source]) => {
      return [name, typeof source === "string" ? values[source] : filled(name, source)];
    });
    return run("denoiser", {z, t: Float32Array.of(t), ...Object.fromEntries(taken)});
  };
  const noise = noises(Number(at("seed").value), shape.reduce((a, b) => a * b), plan.noises);
  const x0 = await sample(plan, noise, call);
  const image = networks.decoder ? await run("decoder", {x0}) : unit(x0);
  return condition?.paste ? paste(image, cond.data) : image;
}

// ---- pictures

// A picture as 8-bit RGB, with transparency on white. Colour profiles are not applied, as in Python.
async function read(blob) {
  const bitmap = await createImageBitmap(blob, {colorSpaceConversion: "none"}).catch(() => {
    throw new Error("This file cannot be read as a picture: choose a PNG, JPEG or WebP.");
  });
  const {width: w, height: h} = bitmap, canvas = new OffscreenCanvas(w, h), draw = canvas.getContext("2d");
  draw.fillStyle = "white";
  draw.fillRect(0, 0, w, h);
  draw.drawImage(bitmap, 0, 0);
  return {data: draw.getImageData(0, 0, w, h).data.filter((_, i) => i % 4 !== 3), h, w, c: 3};
}

// Draw rows of pixels of c channels, of which three count, in [0, 1].
function show(canvas, data, size, c = 3) {
  canvas.width = canvas.height = size;
  const pixels = new ImageData(size, size);
  for (let i = 0; i < size * size * 4; i++) {
    pixels.data[i] = i % 4 === 3 ? 255 : Math.round(data[Math.floor(i / 4) * c + (i % 4)] * 255);
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

// Take a picture, a blob or a promise of one, and show what the networks see of it; what was chosen last counts. An
// example of a depth map is near where it is bright: it is a condition, of which the distances are not known.
async function choose(given, example = false) {
  const {condition} = state.manifest, {kind, size} = condition, before = at("before"), turn = ++state.turn;
  state.picture = null;
  before.width = before.height = size;
  clear();
  const blob = await given;
  if (kind === "depth" && deepPng(new Uint8Array(await blob.slice(0, 25).arrayBuffer()))) {
    throw new Error("This PNG has 16 bits, of which a browser reads 8: save it with 8, from black to white.");
  }
  const picture = await read(blob);
  if (turn !== state.turn) return;
  state.read = {...condition, metres: condition.metres && !example};
  if (kind === "inpaint") show(before, fit(picture, size).data.map((x) => x / 255), size);
  else show(before, CONDITIONS[kind](picture, state.read).data, size);
  state.picture = picture;
  say("");
}

// No result, and no hole.
function clear() {
  const {size} = state.manifest.condition ?? {size: 1};
  state.mask = {data: new Float32Array(size * size), h: size, w: size, c: 1};
  at("after").width = at("after").height = at("hole").width = at("hole").height = size;
  at("hole").hidden = state.manifest.condition?.kind !== "inpaint";
  at("save").hidden = true;
  at("time").textContent = "";
}

// A round dot of the brush in the hole, at an event's place; after a result, painting goes on with the same hole.
function dot(event) {
  const {size} = state.manifest.condition, box = at("hole").getBoundingClientRect(), radius = at("brush").value / 2;
  const x = (event.clientX - box.left) / box.width * size, y = (event.clientY - box.top) / box.height * size;
  const draw = at("hole").getContext("2d");
  draw.fillStyle = "#e33";
  at("slider").value = 100;
  slide();
  for (let i = 0; i < size * size; i++) {
    if (Math.hypot(i % size + 0.5 - x, Math.floor(i / size) + 0.5 - y) > radius) continue;
    state.mask.data[i] = 1;
    draw.fillRect(i % size, Math.floor(i / size), 1, 1);
  }
}

// The result is seen to the right of the slider; the hole with the picture before.
function slide() {
  const share = at("slider").value;
  at("after").style.clipPath = `inset(0 0 0 ${share}%)`;
  at("hole").style.clipPath = at("save").hidden ? "none" : `inset(0 ${100 - share}% 0 0)`;
}

async function go(event) {
  event.preventDefault();
  if (state.busy) return;
  const {condition, text} = state.manifest;
  if (condition && !state.picture) throw new Error("Choose a picture first.");
  if (text?.instruction && !at("prompt").value.trim()) {
    throw new Error("The instruction is empty: say what to change, such as: make it blue.");
  }
  state.busy = at("go").disabled = true;
  try {
    say("Generating ...");
    await new Promise((done) => setTimeout(done)); // the sentence is drawn first
    const cond = condition && CONDITIONS[condition.kind](state.picture, state.read, state.mask);
    const start = performance.now(), image = await generated(cond), took = performance.now() - start;
    const size = Math.sqrt(image.length / 3);
    show(at("after"), image, size);
    if (cond) show(at("before"), cond.data, cond.w, cond.c);
    at("save").href = at("after").toDataURL();
    at("save").hidden = false;
    at("slider").value = 0;
    slide();
    at("time").textContent = `${Math.round(took)} ms a picture`;
    say("");
  } finally {
    state.busy = at("go").disabled = false;
  }
}

// ---- the start

function controls() {
  const {title, text, condition, plans, examples} = state.manifest, option = (x, name = x) => new Option(name, x);
  at("title").textContent = document.title = title;
  at("text-row").hidden = text?.kind !== "prompt";
  at("text-hint").textContent = text?.instruction ? "Instruction" : "Prompt";
  at("label-row").hidden = text?.kind !== "label";
  if (text?.kind === "label") {
    at("label").append(option(text.labels, "any"), ...Array.from({length: text.labels}, (_, i) => option(i)));
  }
  at("steps").append(...Object.keys(plans).map((n) => option(n)));
  for (const row of ["file-row", "slider-row"]) at(row).hidden = !condition;
  at("brush-row").hidden = condition?.kind !== "inpaint";
  const special = text?.instruction ? "edit" : condition?.metres ? "metres" : condition?.kind;
  at("file-hint").textContent = HINTS[special]?.replace("SIZE", `${condition.size} x ${condition.size}`);
  at("prompt").value = examples[0]?.text ?? "";
  for (const {image, text} of examples.filter(({image}) => image)) {
    const picture = Object.assign(new Image(), {src: image, alt: text ?? "example", title: text ?? ""});
    picture.onclick = guarded(async () => {
      at("prompt").value = text ?? "";
      await choose(fetch(image).then((found) => found.blob()), true);
    });
    at("examples").append(picture);
  }
}

function listen() {
  at("controls").onsubmit = guarded(go);
  at("file").onclick = () => { at("file").value = ""; }; // a file that is chosen again counts, too
  at("file").onchange = guarded(async () => at("file").files.length && choose(at("file").files[0]));
  at("clear").onclick = clear;
  at("slider").oninput = slide;
  at("hole").onpointerdown = (event) => {
    at("hole").setPointerCapture(event.pointerId);
    dot(event);
  };
  at("hole").onpointermove = (event) => event.buttons && dot(event);
}

guarded(async () => {
  state.manifest = await json("manifest.json");
  controls();
  for (const name of Object.keys(state.manifest.networks)) {
    say(`Loading ${name}.onnx ...`);
    state.sessions[name] = await ort.InferenceSession.create(`${name}.onnx`, {logSeverityLevel: 3});
  }
  if (state.manifest.text?.kind === "prompt") state.tokens = tokenizer(await json("tokenizer.json"));
  clear();
  listen();
  document.querySelector("main").hidden = false;
  say("");
})();

"use strict";

const TEXTS = {
  en: {
    model: "Model", beside: "Beside", compare: "Compare", settings: "Settings", fresh: "New chat",
    other_language: "中文", system: "System message", temperature: "Temperature", top_p: "Top p",
    max_tokens: "Longest answer, tokens", repetition: "Repetition penalty", seed: "Seed", key: "API key",
    question: "Your question", hint: "Ask something", keys: "Enter sends, Shift+Enter begins a line.", send: "Send",
    stop: "Stop", again: "Try again", stopped: "stopped", cut: "cut at the longest answer",
    empty: "Choose a model or an adapter and ask. “Compare” puts two answers to one question side by side.",
    tokens: (n, s) => `${n} tokens, ${s} s`, lost: "The server cannot be reached.", adapter: "adapter",
    no_key: "This server asks for an API key: type it in the settings.",
  },
  zh: {
    model: "模型", beside: "对照", compare: "对比", settings: "设置", fresh: "新对话",
    other_language: "English", system: "系统提示", temperature: "温度", top_p: "Top p",
    max_tokens: "回答最长词元数", repetition: "重复惩罚", seed: "随机种子", key: "API 密钥",
    question: "你的问题", hint: "输入问题", keys: "回车发送，Shift+回车换行。", send: "发送",
    stop: "停止", again: "重新回答", stopped: "已停止", cut: "已到最大长度",
    empty: "选择模型或适配器，然后提问。点“对比”可让两个模型并排回答同一个问题。",
    tokens: (n, s) => `${n} 个词元，${s} 秒`, lost: "无法连接服务器。", adapter: "适配器",
    no_key: "服务器需要 API 密钥：请在设置中填写。",
  },
};
const byId = (id) => document.getElementById(id);
const state = { language: "en", turns: [], models: [], compare: false };
const text = (key) => TEXTS[state.language][key];

function make(tag, name, content) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (content !== undefined) element.textContent = content;
  return element;
}

// --- the server

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function faultOf(response) {
  if (response.status === 401) return text("no_key");
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

async function readModels() {
  let response;
  try {
    response = await fetch("v1/models", { headers: headers() });
  } catch {
    return say(text("lost"));
  }
  if (!response.ok) {
    if (response.status === 401) showSettings(true);
    return say(await faultOf(response));
  }
  state.models = (await response.json()).data;
  for (const [place, id] of ["first", "second"].entries()) {
    const select = byId(id);
    const before = select.value;
    select.replaceChildren(...state.models.map((model) => {
      const option = make("option", "", model.parent ? `${model.id} (${text("adapter")})` : model.id);
      option.value = model.id;
      return option;
    }));
    const adapters = state.models.filter((model) => model.parent);
    const wanted = before || (place ? state.models[0].id : (adapters[0] || state.models[0]).id);
    if (state.models.some((model) => model.id === wanted)) select.value = wanted;
  }
  say("");
}

function settingsOf() {
  const found = {};
  for (const [id, key] of [["temperature", "temperature"], ["top_p", "top_p"], ["max_tokens", "max_tokens"],
    ["repetition", "repetition_penalty"], ["seed", "seed"]]) {
    const value = byId(id).value.trim();
    if (value !== "") found[key] = Number(value);
  }
  return found;
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- turns: one question, with an answer for each model that was asked

function historyFor(turn, place) {
  const messages = [];
  const system = byId("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const past of state.turns) {
    messages.push({ role: "user", content: past.question });
    if (past === turn) break;
    const answer = past.answers[place] || past.answers[0];
    messages.push({ role: "assistant", content: answer.text });
  }
  return messages;
}

async function run(turn, place) {
  const answer = turn.answers[place];
  Object.assign(answer, { text: "", fault: "", finish: "", tokens: 0, seconds: 0, control: new AbortController() });
  const began = performance.now();
  drawAnswer(answer);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: answer.control.signal,
      body: JSON.stringify({
        model: answer.model, messages: historyFor(turn, place), stream: true,
        stream_options: { include_usage: true }, ...settingsOf(),
      }),
    });
    if (!response.ok) throw new Error(await faultOf(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) answer.tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      answer.text += choice.delta.content || "";
      if (choice.finish_reason) answer.finish = choice.finish_reason;
      drawAnswer(answer);
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else answer.fault = error instanceof TypeError ? text("lost") : error.message;
  }
  answer.control = null;
  answer.seconds = (performance.now() - began) / 1000;
  drawAnswer(answer);
  busy();
}

function ask() {
  const question = byId("question").value.trim();
  if (!question || running().length || !state.models.length) return;
  byId("question").value = "";
  grow();
  const names = [byId("first").value, ...(state.compare ? [byId("second").value] : [])];
  const turn = { question, answers: names.map((model) => ({ model, text: "" })) };
  state.turns.push(turn);
  drawTurn(turn);
  turn.answers.forEach((_, place) => run(turn, place));
  busy();
}

const running = () => state.turns.flatMap((turn) => turn.answers).filter((answer) => answer.control);

// --- drawing

function drawTurn(turn) {
  byId("empty").hidden = true;
  for (const button of document.querySelectorAll(".again")) button.remove();
  const element = make("article", "turn");
  const answers = make("div", turn.answers.length > 1 ? "answers two" : "answers");
  element.append(make("div", "asked", turn.question), answers);
  turn.answers.forEach((answer, place) => {
    const card = make("section", "answer");
    answer.card = card;
    answer.again = () => { run(turn, place); busy(); };
    answer.isLast = () => state.turns.at(-1) === turn;
    card.append(make("h3", "", answer.model), make("div", "text"), make("div", "fault"), make("div", "below"));
    answers.append(card);
    drawAnswer(answer);
  });
  byId("turns").append(element);
  element.scrollIntoView({ block: "end" });
}

function drawAnswer(answer) {
  const { card } = answer;
  const main = byId("turns");
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
  const isRunning = Boolean(answer.control);
  card.classList.toggle("running", isRunning);
  card.querySelector(".text").textContent = answer.text;
  card.querySelector(".fault").textContent = answer.fault || "";
  const below = card.querySelector(".below");
  const parts = [];
  if (isRunning) {
    const stop = below.querySelector(".stop") || make("button", "stop");
    stop.type = "button";
    stop.textContent = text("stop");
    stop.onclick = () => answer.control && answer.control.abort();
    parts.push(stop);
  } else if (answer.isLast()) {
    const again = make("button", "again", text("again"));
    again.type = "button";
    again.onclick = answer.again;
    parts.push(again);
  }
  const said = [];
  if (answer.finish === "stopped") said.push(text("stopped"));
  if (answer.finish === "length") said.push(text("cut"));
  if (!isRunning && answer.tokens) said.push(TEXTS[state.language].tokens(answer.tokens, answer.seconds.toFixed(1)));
  parts.push(make("span", "count", said.join(" · ")));
  if (!(isRunning && below.querySelector(".stop"))) below.replaceChildren(...parts);
  if (atEnd) main.scrollTop = main.scrollHeight;
}

function busy() {
  byId("send").disabled = running().length > 0;
}

function say(line) {
  byId("empty").textContent = line || text("empty");
  byId("empty").hidden = !line && state.turns.length > 0;
}

function showSettings(open) {
  byId("settings").hidden = !open;
  byId("open-settings").setAttribute("aria-expanded", String(open));
}

function speak(language) {
  state.language = language;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = text(element.dataset.hint);
  byId("question").title = text("keys");
  byId("language").textContent = text("other_language");
  say("");
  for (const turn of state.turns) for (const answer of turn.answers) drawAnswer(answer);
}

function grow() {
  const area = byId("question");
  area.rows = Math.min(10, Math.max(1, area.value.split("\n").length));
}

// --- what the reader does

byId("send").onclick = ask;
byId("question").oninput = grow;
byId("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    ask();
  }
};
byId("compare").onclick = () => {
  state.compare = !state.compare;
  byId("compare").setAttribute("aria-pressed", String(state.compare));
  byId("other").hidden = !state.compare;
};
byId("settings").onsubmit = (event) => event.preventDefault();
byId("open-settings").onclick = () => showSettings(byId("settings").hidden);
byId("fresh").onclick = () => {
  for (const answer of running()) answer.control.abort();
  state.turns = [];
  for (const element of document.querySelectorAll(".turn")) element.remove();
  say("");
  byId("question").focus();
};
byId("language").onclick = () => {
  speak(state.language === "zh" ? "en" : "zh");
  localStorage.setItem("language", state.language);
  readModels();
};
byId("key").onchange = () => {
  sessionStorage.setItem("key", byId("key").value);
  readModels();
};
for (const id of ["first", "second"]) byId(id).onfocus = () => { if (!running().length) readModels(); };

byId("key").value = sessionStorage.getItem("key") || "";
speak(localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en"));
readModels();
byId("question").focus();

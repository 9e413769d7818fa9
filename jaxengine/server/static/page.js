// The page: conversations kept in the browser, answers streamed from the server.

import { events, key, request } from "./api.js";
import { engineView } from "./engine.js";
import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed"];

const store = {
  load: () => JSON.parse(localStorage.getItem("jaxengine-conversations") ?? "[]"),
  save: () => localStorage.setItem("jaxengine-conversations", JSON.stringify(state.conversations)),
};
const state = { conversations: store.load(), current: null, abort: null };

// Conversations

function startConversation() {
  state.current = { id: crypto.randomUUID?.() ?? String(Date.now()), title: "New conversation", messages: [] };
  state.conversations.unshift(state.current);
  show();
  $("prompt").focus();
}

function open(conversation) {
  if (state.abort) return;
  state.current = conversation;
  $("side").classList.remove("open");
  show();
}

function remove(conversation) {
  if (state.abort) return;
  state.conversations = state.conversations.filter((other) => other !== conversation);
  store.save();
  if (state.current === conversation) state.current = state.conversations[0] ?? null;
  if (!state.current) startConversation();
  show();
}

function button(text, label, action, className = "plain") {
  const node = document.createElement("button");
  Object.assign(node, { type: "button", textContent: text, className });
  node.setAttribute("aria-label", label);
  node.addEventListener("click", action);
  return node;
}

function showConversations() {
  $("conversations").replaceChildren(...state.conversations.map((conversation) => {
    const item = document.createElement("li");
    item.setAttribute("aria-current", String(conversation === state.current));
    item.append(
      button(conversation.title, `Open: ${conversation.title}`, () => open(conversation), "title"),
      button("×", `Delete: ${conversation.title}`, () => remove(conversation)),
    );
    return item;
  }));
}

function messageNode(message, index) {
  const node = document.createElement("li");
  node.className = message.role;
  const who = document.createElement("div");
  who.className = "who";
  who.textContent = message.role === "user" ? "You" : "Model";
  const body = document.createElement("div");
  body.className = message.error ? "body error" : "body";
  fill(body, message);
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(message.role === "user"
    ? button("Edit", "Edit and send again", () => edit(index))
    : button("Again", "Generate this answer again", () => answer(index)));
  node.append(who, body, tools);
  return node;
}

function fill(body, message) {
  const parts = [];
  if (message.thought) {
    const thought = document.createElement("details");
    thought.className = "thought";
    thought.open = !message.content;
    const summary = document.createElement("summary");
    summary.textContent = "Reasoning";
    thought.append(summary, ...render(message.thought));
    parts.push(thought);
  }
  body.replaceChildren(...parts, ...render(message.content));
}

function show() {
  showConversations();
  $("messages").replaceChildren(...state.current.messages.map(messageNode));
  $("messages").lastElementChild?.scrollIntoView({ block: "end" });
}

// Answers

function edit(index) {
  if (state.abort) return;
  $("prompt").value = state.current.messages[index].content;
  state.current.messages = state.current.messages.slice(0, index);
  show();
  $("prompt").focus();
}

function parameters() {
  const chosen = { model: $("model").value, stream: true };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  return chosen;
}

async function answer(index) {
  if (state.abort) return;
  const conversation = state.current;
  conversation.messages = conversation.messages.slice(0, index);
  const system = $("system").value.trim();
  const sent = conversation.messages.filter((m) => !m.error).map(({ role, content }) => ({ role, content }));
  const messages = system ? [{ role: "system", content: system }, ...sent] : sent;
  const reply = { role: "assistant", content: "", thought: "" };
  conversation.messages.push(reply);
  show();
  const body = $("messages").lastElementChild.querySelector(".body");
  state.abort = new AbortController();
  $("stop").hidden = false;
  $("send").hidden = true;
  try {
    const response = await request("v1/chat/completions", { ...parameters(), messages }, state.abort.signal);
    for await (const event of events(response)) {
      const delta = event.choices?.[0]?.delta ?? {};
      reply.content += delta.content ?? "";
      reply.thought += delta.reasoning_content ?? delta.reasoning ?? "";
      const atEnd = isAtEnd();
      fill(body, reply);
      if (atEnd) body.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      reply.error = true;
      reply.content += `${reply.content ? "\n\n" : ""}${error.message}`;
    }
    if (error.status === 401) askForKey();
  } finally {
    state.abort = null;
    $("stop").hidden = true;
    $("send").hidden = false;
    store.save();
    if (state.current === conversation) show();
    $("prompt").focus();
  }
}

function isAtEnd() {
  const list = $("messages");
  return list.scrollHeight - list.scrollTop - list.clientHeight < 80;
}

function send(event) {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || state.abort) return;
  $("prompt").value = "";
  const { messages } = state.current;
  if (!messages.length) state.current.title = text.slice(0, 60);
  messages.push({ role: "user", content: text });
  answer(messages.length);
}

// The server

async function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  dialog.returnValue = "";
  dialog.showModal();
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "ok") return;
    key.set($("key-asked").value);
    $("key").value = key.get();
    findModels();
  }, { once: true });
}

async function findModels() {
  try {
    const { data } = await (await request("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  } catch (error) {
    if (error.status === 401) askForKey();
  }
}

async function checkHealth() {
  try {
    await request("health");
    $("health").textContent = "ready";
    $("health").className = "";
  } catch {
    $("health").textContent = "not reachable";
    $("health").className = "bad";
  }
}

// The page's own controls

function select(name) {
  for (const view of ["chat", "engine"]) {
    const chosen = view === name;
    $(view).hidden = !chosen;
    $(`tab-${view}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${view}`).tabIndex = chosen ? 0 : -1;
  }
}

function switchTab(event) {
  if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const other = event.target.id === "tab-chat" ? "engine" : "chat";
  select(other);
  $(`tab-${other}`).focus();
}

function switchTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  localStorage.setItem("jaxengine-theme", root.dataset.theme);
}

const theme = localStorage.getItem("jaxengine-theme");
if (theme) document.documentElement.dataset.theme = theme;
for (const name of SETTINGS) {
  $(name).value = localStorage.getItem(`jaxengine-${name}`) ?? "";
  $(name).addEventListener("change", () => localStorage.setItem(`jaxengine-${name}`, $(name).value));
}
$("key").value = key.get();
$("key").addEventListener("change", () => { key.set($("key").value); findModels(); });
$("new").addEventListener("click", () => !state.abort && startConversation());
$("form").addEventListener("submit", send);
$("stop").addEventListener("click", () => state.abort?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && state.abort?.abort());
$("theme").addEventListener("click", switchTheme);
$("menu").addEventListener("click", () => {
  $("menu").setAttribute("aria-expanded", String($("side").classList.toggle("open")));
});
for (const view of ["chat", "engine"]) {
  $(`tab-${view}`).addEventListener("click", () => select(view));
  $(`tab-${view}`).addEventListener("keydown", switchTab);
}

const look = engineView($("charts"), $("engine-note"));
setInterval(() => { if (!document.hidden && !$("engine").hidden) look(); }, 1000);
setInterval(checkHealth, 5000);
if (state.conversations.length) open(state.conversations[0]);
else startConversation();
checkHealth();
findModels();

"use strict";
// Follows the sandbox by server-sent events, each of which is a complete snapshot, and changes on the page only what
// differs, so that focus, scroll position and a click in progress are kept. Text from an operation is always set as
// text; the page's policy (Trusted Types) refuses the ways to set it as HTML.

const CONFIRMED_MS = 6000;  // how long an approved operation stays visible
const SETTLE_MS = 300;      // how long buttons ignore clicks after they have moved: the click was meant for another
const COPIED_MS = 3000;

const byId = (id) => document.getElementById(id);
const user = (new URLSearchParams(location.search).get("user") ?? "").trim().toUpperCase();
const phones = new Map();   // by user
let source = null;
let boot = null;            // the run of the sandbox that the page shows; keys are valid for that run only
let serial = 0;
let used = false;           // whether there was ever something to approve: then the instructions stand aside
let chosen = null;          // the user whose phone is shown where there is room for one
let shownHistory = "";

const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);
const seconds = () => performance.now() / 1000;
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const howText = (authType) => authType === "pin" ? "Approved with PIN" : "Approved with face";
const failureText = ({reason, errorCode}) => `${capital(reason ?? "failed")} (${errorCode})`;
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const isLive = () => document.body.dataset.reach === "live";

function element(tag, className, ...content) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...content);
  return node;
}

// Text that others wrote

// Characters that are invisible, change the direction of what follows, or mean nothing: they make one text appear as
// another. Line breaks and tabs are seen; joiners and variants within an emoji belong to it.
const UNSEEN_OR_EMOJI = /((?:\p{Extended_Pictographic}|[0-9#*]\uFE0F)\p{Emoji_Modifier}?[\uFE0F\u20E3]*(?:\u200D\p{Extended_Pictographic}\p{Emoji_Modifier}?\uFE0F?)*)|(?![\n\t])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\p{Co}\p{Default_Ignorable_Code_Point}]/gu;
const UNSEEN_NAMES = {
  0x00AD: "soft hyphen", 0x061C: "Arabic letter mark", 0x200B: "zero-width space", 0x200C: "zero-width non-joiner",
  0x200D: "zero-width joiner", 0x200E: "left-to-right mark", 0x200F: "right-to-left mark", 0x202A: "left-to-right embedding",
  0x202B: "right-to-left embedding", 0x202C: "end of a change of direction", 0x202D: "left-to-right override",
  0x202E: "right-to-left override", 0x2060: "word joiner", 0x2066: "left-to-right isolate",
  0x2067: "right-to-left isolate", 0x2068: "isolate", 0x2069: "end of an isolate", 0xFEFF: "zero-width no-break space",
};

const codeOf = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Returns the nodes that show a text, with a code in place of each character that is not seen. */
function shown(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(UNSEEN_OR_EMOJI)) {
    if (match[1]) continue;  // an emoji
    nodes.push(text.slice(from, match.index), unseenMark(match[0]));
    from = match.index + match[0].length;
  }
  nodes.push(text.slice(from));
  return nodes;
}

function unseenMark(character) {
  const mark = element("span", "unseen-character", codeOf(character));
  mark.title = UNSEEN_NAMES[character.codePointAt(0)] ?? "character that is not seen";
  return mark;
}

/** Returns the same as `shown`, as a plain text, for announcements. */
const spoken = (text) => element("span", "", ...shown(text.slice(0, 200))).textContent;

// The connection to the sandbox

function connect() {
  if (source) return;
  const mine = source = new EventSource(`/sandbox/page/events${user && `?user=${encodeURIComponent(user)}`}`);
  mine.onmessage = (event) => {
    const snapshot = JSON.parse(event.data);
    setReach(snapshot.ended ? "ended" : "live");
    show(snapshot);
    if (snapshot.ended) reconnectLater();
  };
  mine.onerror = () => {
    if (document.body.dataset.reach !== "ended") setReach("gone");
    if (mine.readyState === EventSource.CLOSED) reconnectLater();  // otherwise it reconnects by itself
  };
}

function disconnect() {
  source?.close();
  source = null;
}

function reconnectLater() {
  disconnect();
  setTimeout(() => { if (!document.hidden) connect(); }, 2000);
}

const REACH = {live: "Live", gone: "Sandbox not reachable, trying again…", ended: "The sandbox has ended"};

function setReach(reach) {
  if (reach === document.body.dataset.reach) return;
  document.body.dataset.reach = reach;
  byId("gone").hidden = reach !== "gone";
  byId("ended").hidden = reach !== "ended";
  byId("faults").disabled = reach !== "live";
  setText(byId("reach"), REACH[reach]);
  for (const problem of document.querySelectorAll(".problem")) problem.hidden = true;  // of another time
  for (const phone of phones.values()) for (const card of phone.cards.values()) updateButtons(card);
  for (const form of document.forms) setDisabled(form.querySelector("button"), reach !== "live");
}

async function post(path, body) {
  try {
    const answer = await fetch(path, {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
    });
    return answer.ok ? null : await errorOf(answer);
  } catch {
    return "The sandbox is not reachable.";
  }
}

async function errorOf(answer) {
  try {
    return (await answer.json()).error;
  } catch {
    return `The sandbox answered ${answer.status}; see its log.`;
  }
}

function showProblem(node, text) {
  node.textContent = text;
  node.hidden = false;
}

const setDisabled = (button, disabled) => button.setAttribute("aria-disabled", disabled);

// The snapshot

function show(snapshot) {
  const first = boot !== snapshot.boot;
  if (first) for (const name of [...phones.keys()]) removePhone(name);
  boot = snapshot.boot;
  showFault(snapshot);

  const attempts = Map.groupBy(snapshot.history, (each) => each.key);
  const named = new Set(snapshot.phones.map((each) => each.user));
  for (const name of [...phones.keys()]) if (!named.has(name)) removePhone(name);
  const arrived = snapshot.phones.flatMap((each) => showPhone(each, attempts));

  const pending = snapshot.phones.reduce((sum, each) => sum + each.pending.length + each.more, 0);
  document.title = pending ? `(${pending}) Keyless sandbox` : "Keyless sandbox";
  showHelp(pending > 0 || (!user && snapshot.phones.length > 0));
  byId("crowd").hidden = !snapshot.crowded;
  showUsers(snapshot.phones);
  showHistory(snapshot.history, snapshot.signs);
  if (!user) showRequests(snapshot.requests);
  if (snapshot.ended) showEnd(snapshot, pending);
  if (!first) announce(arrived);
  tick();
}

const FAULTS = {
  unavailable: "The API answers every request with 503, until you choose “works” again.",
  dropped: "The API drops the connection of every request without an answer, until you choose “works” again.",
};

function showFault({fault, fails}) {
  document.querySelector(`[name="fault"][value="${fault}"]`).checked = true;
  const text = FAULTS[fault] ?? (fails ? "A program has told the API to fail. To end that: aiokeyless sandbox recover" : "");
  byId("fault").hidden = !text || !isLive();
  setText(byId("fault"), text);
}

function showHelp(isUsed) {
  if (used || !isUsed) return;
  used = true;
  byId("help").open = false;
  byId("aside").append(byId("help"));
}

function showEnd(snapshot, pending) {
  const success = !pending && snapshot.history.some((each) => !each.errorCode);
  setText(byId("ended"), success
    ? "Everything that was asked for is approved, and the sandbox has ended. What its program says is in its terminal."
    : "The sandbox was ended by its program. This page goes on if it is started again.");
}

function announce(arrived) {
  if (arrived.length === 1) say(`Approval requested of ${arrived[0].phone.name}: ${spoken(arrived[0].text)}`);
  if (arrived.length > 1) say(`${arrived.length} approvals requested`);
}

const say = (text) => { byId("news").textContent = text; };

// Phones

/** Shows which phones there are, for where there is room for one. */
function showUsers(all) {
  byId("main").dataset.phones = all.length > 2 ? "many" : all.length;
  if (!phones.has(chosen)) chosen = (all.find((each) => each.pending.length) ?? all[0])?.user ?? null;
  const nav = byId("users");
  nav.hidden = all.length < 2;
  for (const button of [...nav.children]) if (!phones.has(button.dataset.user)) button.remove();
  for (const [index, {user: name, pending, more}] of all.entries()) {
    const button = [...nav.children].find((each) => each.dataset.user === name) ?? userButton(name);
    if (nav.children[index] !== button) nav.insertBefore(button, nav.children[index] ?? null);
    setText(button.lastElementChild, String(pending.length + more || ""));
  }
  showChosen();
}

function userButton(name) {
  const button = element("button", "", element("span", "", name), document.createElement("b"));
  button.type = "button";
  button.dataset.user = name;
  button.addEventListener("click", () => { chosen = name; showChosen(); });
  return button;
}

function showChosen() {
  for (const button of byId("users").children) button.setAttribute("aria-pressed", button.dataset.user === chosen);
  for (const phone of phones.values()) phone.root.classList.toggle("chosen", phone.name === chosen);
}

function showPhone({user: name, externalUserId, devices, removed, pending, more, lockedFor}, attempts) {
  const phone = phones.get(name) ?? addPhone(name);
  phone.lockedUntil = seconds() + lockedFor;
  showOwner(phone, {externalUserId, devices, removed});
  const keys = new Set(pending.map((each) => each.key));
  for (const card of [...phone.cards.values()]) {
    if (card.done || keys.has(card.key)) continue;
    const approval = attempts.get(card.key)?.find((each) => !each.errorCode);
    if (approval) confirm(phone, card, approval.authType);
    else removeCard(phone, card);  // it was removed from the sandbox, or there are too many newer ones
  }
  const arrived = pending.filter((each) => !phone.cards.has(each.key)).map((each) => addCard(phone, each));
  for (const card of phone.cards.values()) if (!card.done) showAttempts(card, attempts.get(card.key) ?? []);
  showLock(phone);
  phone.more.hidden = !more;
  setText(phone.more, `${more} older ${more === 1 ? "one is" : "ones are"} waiting too.`);
  phone.quiet.hidden = phone.cards.size > 0;
  return arrived;
}

/** Shows what the customer calls a user, and the devices: without one, nothing can be approved. */
function showOwner(phone, {externalUserId, devices, removed}) {
  phone.known.hidden = !externalUserId;
  phone.known.replaceChildren("known as ", ...shown(externalUserId ?? ""));
  const state = [removed, ...devices.map((each) => each.key)].join();
  if (state === phone.shownDevices) return;  // so that the focus on a button is kept
  if (removed && phone.shownDevices !== null) say(`The phone of ${phone.name} was removed.`);
  phone.shownDevices = state;
  phone.hasDevice = !removed;
  phone.removed.hidden = !removed;
  setText(phone.devices.querySelector("summary"), devices.length === 1 ? "1 device" : `${devices.length} devices`);
  phone.devices.querySelector("ul").replaceChildren(...devices.map((each) => deviceItem(phone, each)));
  for (const card of phone.cards.values()) updateButtons(card);
}

function deviceItem(phone, {key, since}) {
  const code = element("code", "", key);
  code.title = key;
  const button = element("button", "small", "Remove");
  button.type = "button";
  button.setAttribute("aria-label", `Remove the device of ${phone.name} that was enrolled at ${since}`);
  button.addEventListener("click", () => change(phone, "/sandbox/page/remove", {user: phone.name, key}));
  return element("li", "", code, button);
}

async function change(phone, path, body, next = phone.devices.querySelector("summary")) {
  const problem = phone.devices.querySelector(".problem");
  problem.hidden = true;
  const error = await post(path, body);
  if (error) showProblem(problem, error);
  else next.focus();  // the button may be gone
}

/** Shows the failed attempts for an operation; they are the newest first. */
function showAttempts(card, attempts) {
  const failed = attempts.filter((each) => each.errorCode);
  const [last] = failed;
  if (last && last.number > card.attempt) {
    card.busy = false;
    if (card.attempt >= 0) say(failureText(last));
  }
  card.attempt = last?.number ?? 0;
  const line = card.find(".attempts");
  line.hidden = !failed.length;
  const count = failed.length > 1 ? `${failed.length} attempts failed, the last one: ` : "";
  setText(line, last ? `${count}${failureText(last)}. The operation stays pending.` : "");
  updateButtons(card);
}

function showLock(phone) {
  const left = phone.lockedUntil - seconds();
  const locked = left > 0;
  const minutes = Math.floor(left / 60), rest = String(Math.floor(left % 60)).padStart(2, "0");
  setText(phone.locked.querySelector("p"), locked ? `Locked out for ${minutes}:${rest}, after too many failed attempts.` : "");
  if (phone.locked.hidden !== locked) return;
  phone.locked.hidden = !locked;
  for (const card of phone.cards.values()) updateButtons(card);
  if (locked) say(`The phone of ${phone.name} is locked out, after too many failed attempts.`);
}

function addPhone(name) {
  const root = copyOf("phone-template");
  const find = (selector) => root.querySelector(selector);
  const phone = {
    name, root, cards: new Map(), settle: 0, lockedUntil: 0, locked: find(".locked"),
    title: find("h2"), list: find(".cards"), more: find(".more"), quiet: find(".quiet"),
    known: find(".known"), removed: find(".removed"), devices: find(".devices"), shownDevices: null, hasDevice: true,
  };
  const unlock = phone.locked.querySelector("button");
  unlock.setAttribute("aria-label", `Unlock the phone of ${name}`);
  unlock.addEventListener("click", () => change(phone, "/sandbox/page/unlock", {user: name}, phone.title));
  const enroll = find(".devices > button");
  enroll.setAttribute("aria-label", `Enroll on a new device: ${name}`);
  enroll.addEventListener("click", () => change(phone, "/sandbox/page/enroll", {user: name, externalUserId: ""}));
  phone.title.textContent = name;
  phone.title.title = name;
  phone.title.id = `phone-${++serial}`;
  root.setAttribute("aria-labelledby", phone.title.id);
  phone.list.setAttribute("aria-labelledby", phone.title.id);
  const alone = find("a");
  alone.href = `/?user=${encodeURIComponent(name)}`;
  alone.hidden = Boolean(user);
  alone.setAttribute("aria-label", `Open alone the phone of ${name}`);
  byId("phones").append(root);
  phones.set(name, phone);
  return phone;
}

function removePhone(name) {
  const {root} = phones.get(name);
  const focused = root.contains(document.activeElement);
  root.remove();
  phones.delete(name);
  if (focused) byId("title").focus();
}

// Operations

function addCard(phone, data) {
  const {key, number, externalUserId, age} = data;
  const root = copyOf("card-template");
  const find = (selector) => root.querySelector(selector);
  const card = {
    key, number, root, find, phone, attempt: -1, since: seconds() - age, age: find(".age"), done: false, busy: false,
    text: data.operationPayload || "No text", wholeText: data.characters === [...data.operationPayload ?? ""].length,
  };
  const payload = find(".payload");
  payload.id = `payload-${++serial}`;
  payload.classList.toggle("none", !data.operationPayload);
  find(".id").append(...shown(data.operationId));
  if (externalUserId) find(".external").append(...shown(externalUserId));
  else { find(".external").previousElementSibling.remove(); find(".external").remove(); }
  showText(card);
  if (!card.wholeText) showThatMoreIsThere(card, data);
  root.dataset.number = number;
  for (const button of root.querySelectorAll(".actions button")) {
    button.setAttribute("aria-describedby", payload.id);  // tells the buttons of the same name apart
    button.addEventListener("click", () => act(card, button));
  }
  updateButtons(card);
  if (phone.cards.size) settle(phone);
  const older = [...phone.list.children].find((each) => Number(each.dataset.number) < number);
  phone.list.insertBefore(root, older ?? null);
  phone.cards.set(key, card);
  return card;
}

function showText(card) {
  card.find(".payload").replaceChildren(...shown(card.text));
  card.find(".payload").classList.toggle("long", card.text.length > 200);
  card.find(".marks").hidden = !card.root.querySelector(".unseen-character");
}

/** Offers the whole of a text whose start is shown: what was not shown to its end cannot be approved. */
function showThatMoreIsThere(card, {characters, readable}) {
  const count = characters.toLocaleString("en");
  const cut = card.find(".cut");
  cut.hidden = false;
  cut.textContent = readable
    ? `This is the start of a text of ${count} characters. Read all of it before you approve it.`
    : `This is the start of a text of ${count} characters, which is too long to be read here, so it cannot be approved here.`;
  const button = card.find(".read");
  button.hidden = !readable;
  button.textContent = `Read all ${count} characters`;
  button.addEventListener("click", () => readAll(card));
}

async function readAll(card) {
  const query = new URLSearchParams({user: card.phone.name, key: card.key});
  try {
    const answer = await fetch(`/sandbox/page/payload?${query}`);
    if (!answer.ok) throw new Error(await errorOf(answer));
    card.text = (await answer.json()).operationPayload;
  } catch (error) {
    showProblem(card.find(".problem"), error instanceof TypeError ? "The sandbox is not reachable." : error.message);
    return;
  }
  card.wholeText = true;
  card.find(".cut").hidden = true;
  card.find(".read").hidden = true;
  showText(card);
  updateButtons(card);
  card.find(".payload").focus();
}

/** Whether a button of a card may be used: an approval needs the whole text, and a phone that is not locked. */
function mayUse(card, button) {
  if (card.busy || card.done || !card.phone.hasDevice || !isLive()) return false;
  if (button.dataset.code === "30003") return true;
  return card.wholeText && card.phone.lockedUntil <= seconds();
}

function updateButtons(card) {
  for (const button of card.root.querySelectorAll(".actions button")) setDisabled(button, !mayUse(card, button));
}

async function act(card, button) {
  if (!mayUse(card, button)) return;
  card.busy = true;
  updateButtons(card);
  card.find(".problem").hidden = true;
  const {how, code} = button.dataset;
  const operation = {user: card.phone.name, key: card.key};
  const error = how ? await post("/sandbox/page/approve", {...operation, authType: how})
    : await post("/sandbox/page/fail", {...operation, errorCode: Number(code)});
  if (!error) return;  // the next snapshot shows it
  card.busy = false;
  updateButtons(card);
  showProblem(card.find(".problem"), error);
}

function confirm(phone, card, authType) {
  const {root} = card;
  const focused = root.contains(document.activeElement);
  card.done = true;
  root.style.minHeight = `${root.offsetHeight}px`;  // so that the second click of a double-click hits no other button
  const verdict = copyOf("verdict-template");
  verdict.append(howText(authType));
  root.classList.add("done");
  root.prepend(verdict);
  if (focused) root.focus({preventScroll: true});
  say(`${howText(authType)}: ${spoken(card.text)}`);
  setTimeout(() => {
    // A page whose sandbox has ended keeps what it shows.
    if (phone.cards.get(card.key) === card && document.body.dataset.reach !== "ended") removeCard(phone, card);
  }, CONFIRMED_MS);
}

function removeCard(phone, card) {
  const {root} = card;
  const focused = root.contains(document.activeElement);
  // To a card and never to its button: holding Enter must not approve one operation after the other.
  const next = root.nextElementSibling ?? root.previousElementSibling ?? phone.title;
  root.remove();
  phone.cards.delete(card.key);
  settle(phone);
  phone.quiet.hidden = phone.cards.size > 0;
  if (focused) next.focus({preventScroll: true});
}

function settle(phone) {
  clearTimeout(phone.settle);
  phone.list.classList.add("settling");
  phone.settle = setTimeout(() => phone.list.classList.remove("settling"), SETTLE_MS);
}

function tick() {
  const now = seconds();
  for (const phone of phones.values()) {
    showLock(phone);
    for (const card of phone.cards.values()) setText(card.age, ageText(now - card.since));
  }
}

function ageText(age) {
  if (age < 5) return "just now";
  if (age < 60) return `${Math.floor(age)} s ago`;
  if (age < 3600) return `${Math.floor(age / 60)} min ago`;
  return age < 86400 ? `${Math.floor(age / 3600)} h ago` : `${Math.floor(age / 86400)} d ago`;
}

// The history

const APPROVED_PATH = "M5 12.5l4.5 4.5L19 7";
const FAILED_PATH = "M6.5 6.5l11 11M17.5 6.5l-11 11";

function showHistory(entries, signs) {
  byId("history").hidden = !entries.length;
  byId("no-history").hidden = entries.length > 0;
  const state = [boot, ...entries.map((each) => each.number)].join();
  if (state === shownHistory) return;  // so that a position in the list is kept
  shownHistory = state;
  byId("history").replaceChildren(...entries.map((each) => historyItem(each, signs)));
}

function historyItem(entry, signs) {
  const {user: name, authType, errorCode, text, age} = entry;
  const what = element("span", "what", ...shown(text || "No text"));
  what.dir = "auto";
  const at = new Date(Date.now() - 1000 * age).toLocaleTimeString("en-GB");
  return element("li", "",
    errorCode ? icon("failed", FAILED_PATH) : icon("approved", APPROVED_PATH),
    element("strong", "", errorCode ? failureText(entry) : howText(authType)),
    what, element("small", "", `${name}, ${at}`),
    ...(signs && !errorCode ? [tokenButton(entry)] : []));
}

const COPY_TOKEN = "Signed: copy the token";

/** Returns a button that copies what the phone signed, as the app would hand it to a backend. */
function tokenButton({number, text}) {
  const button = element("button", "small", COPY_TOKEN);
  button.type = "button";
  button.setAttribute("aria-label", `${COPY_TOKEN} for ${spoken(text || "no text")}`);
  button.addEventListener("click", async () => {
    try {
      const answer = await fetch(`/sandbox/page/token?number=${number}`);
      if (!answer.ok) throw new Error(await errorOf(answer));
      await navigator.clipboard.writeText((await answer.json()).token);
      button.textContent = "Copied";
    } catch (error) {  // a browser permits to copy on localhost only
      button.textContent = error instanceof TypeError ? "Cannot be copied here: open this page on localhost" : error.message;
    }
    say(button.textContent);
    setTimeout(() => { button.textContent = COPY_TOKEN; }, COPIED_MS);
  });
  return button;
}

function icon(className, path) {
  const namespace = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(namespace, "svg");
  for (const [name, value] of Object.entries({class: className, width: 18, height: 18, viewBox: "0 0 24 24", "aria-hidden": true})) {
    svg.setAttribute(name, value);
  }
  const line = document.createElementNS(namespace, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

// The journal

function showRequests(requests) {
  const rows = requests.map((each) => {
    const over = each.status !== null || each.duration > 0;
    const status = document.createElement("span");
    status.className = "status";
    status.dataset.class = each.status === null ? "" : String(each.status)[0];
    status.textContent = each.status ?? (over ? "no answer" : "…");
    const code = document.createElement("code");
    const method = document.createElement("b");
    method.textContent = each.method;
    code.append(method, " ", ...breakable(each.path));
    const at = new Date(Date.now() - 1000 * each.age).toLocaleTimeString("en-GB");
    return rowOf([at, code, status, over ? durationText(each.duration) : "…"]);
  });
  byId("rows").replaceChildren(...rows);
  byId("requests").hidden = !rows.length;
  byId("no-requests").hidden = rows.length > 0;
}

function breakable(path) {
  return path.split(/(?<=\/)/).flatMap((step) => [step, document.createElement("wbr")]);
}

function rowOf(contents) {
  const row = document.createElement("tr");
  for (const content of contents) row.insertCell().append(content);
  return row;
}

function durationText(duration) {
  const ms = 1000 * duration;
  if (ms < 0.1) return "<0.1 ms";
  return ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10000 ? `${Math.round(ms)} ms` : `${duration.toFixed(1)} s`;
}

// The other controls

async function createOperation(event) {
  event.preventDefault();
  const button = byId("try").querySelector("button");
  const problem = byId("try-problem");
  if (button.getAttribute("aria-disabled") === "true") return;
  setDisabled(button, true);
  problem.hidden = true;
  const error = await post("/sandbox/page/create", {user: byId("try-user").value, operationPayload: byId("try-payload").value});
  setDisabled(button, !isLive());
  if (error) return showProblem(problem, error);
  chosen = byId("try-user").value.trim().toUpperCase();
}

async function enrollUser(event) {
  event.preventDefault();
  const button = byId("enroll").querySelector("button");
  const problem = byId("enroll-problem");
  if (button.getAttribute("aria-disabled") === "true") return;
  setDisabled(button, true);
  problem.hidden = true;
  const enrolled = byId("enroll-user").value;
  const error = await post("/sandbox/page/enroll", {user: enrolled, externalUserId: byId("enroll-external").value.trim()});
  setDisabled(button, !isLive());
  if (error) return showProblem(problem, error);
  chosen = enrolled.trim().toUpperCase();
  say(`${chosen} is enrolled.`);
}

async function chooseFault(event) {
  const error = await post("/sandbox/page/fault", {fault: event.target.value});
  if (error) say(error);
}

async function copyBeside(button) {
  const shownText = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(shownText.textContent);
    button.textContent = "Copied";
  } catch {  // a browser permits it on localhost only
    getSelection().selectAllChildren(shownText);
    button.textContent = "Selected: press Ctrl+C";
  }
  say(button.textContent);
  setTimeout(() => { button.textContent = "Copy"; }, COPIED_MS);
}

// The start

function start() {
  setText(byId("reach"), "Connecting…");
  byId("environment").textContent = `export KEYLESS_BASE_URL=${location.origin}\nexport KEYLESS_API_KEY=sandbox-key`;
  byId("command").textContent = `aiokeyless create ${user || "C0FFEE"} --payload "Pay 40 EUR to Alice?"`;
  byId("all").hidden = !user;
  byId("journal").hidden = Boolean(user);
  byId("try-user").value = user || "C0FFEE";
  byId("try").addEventListener("submit", createOperation);
  byId("enroll-user").value = user || "C0FFEE";
  byId("enroll").addEventListener("submit", enrollUser);
  for (const button of document.querySelectorAll(".copied > button")) button.addEventListener("click", () => copyBeside(button));
  byId("faults").addEventListener("change", chooseFault);
  // A browser opens at most six connections to a host, and each stream takes one: hidden pages release theirs.
  document.addEventListener("visibilitychange", () => { if (document.hidden) disconnect(); else connect(); });
  window.addEventListener("pageshow", connect);
  setInterval(tick, 1000);
  connect();
}

if (user && !/^[0-9A-F]+$/.test(user)) {
  setText(byId("reach"), "Not connected");
  byId("wrong").textContent = `“${user.slice(0, 100)}” is not a user id. A user id is a hex string, such as C0FFEE.`;
  byId("wrong").hidden = false;
  byId("all").hidden = false;
  for (const each of [byId("faults"), byId("side"), byId("help")]) each.hidden = true;
} else {
  start();
}

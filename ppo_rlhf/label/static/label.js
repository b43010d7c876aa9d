// The labelling page works without this file; with it choices go out without a new page, and by keys.
"use strict";

const said = document.getElementById("said");
let lookedAt = 0; // milliseconds that this pair was in view before it was last hidden
let since = document.hidden ? null : performance.now();
let busy = false;

function secondsLookedAt() {
  return (lookedAt + (since === null ? 0 : performance.now() - since)) / 1000;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden && since !== null) {
    lookedAt += performance.now() - since;
    since = null;
  } else if (!document.hidden && since === null) {
    since = performance.now();
  }
});

function tell(problem) {
  const place = document.querySelector(".problem");
  place.textContent = problem;
  place.hidden = false;
}

function show(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  document.getElementById("main").replaceChildren(...page.getElementById("main").children);
  document.title = page.title;
  lookedAt = 0;
  since = document.hidden ? null : performance.now();
  prepare();
  window.scrollTo(0, 0);
  document.getElementById("task").focus({ preventScroll: true });
  const message = document.querySelector("[data-message]").dataset.message;
  const counts = document.querySelector(".progress p").textContent;
  said.textContent = `${message} ${counts}`;
}

async function send(form, submitter) {
  const fields = new URLSearchParams(new FormData(form, submitter));
  const response = await fetch(form.action, { method: "POST", body: fields, headers: { "X-Live": "1" } });
  const html = await response.text();
  if (response.ok) {
    show(html);
  } else {
    const refusal = new DOMParser().parseFromString(html, "text/html").querySelector(".refusal");
    tell(refusal ? refusal.textContent : html);
  }
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("[data-live]")) return;
  event.preventDefault();
  if (busy) return;
  busy = true;
  if (form.elements.seconds) form.elements.seconds.value = secondsLookedAt().toFixed(2);
  document.body.classList.add("busy");
  try {
    await send(form, event.submitter);
  } catch {
    tell("Not saved: the server does not answer. Choose again when it is back.");
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
});

// Ranking: each number gives its response the next place.
function place(number) {
  const fieldsets = [...document.querySelectorAll(".places")];
  const next = fieldsets.filter((fieldset) => fieldset.querySelector(":checked")).length + 1;
  const chosen = fieldsets[number - 1];
  if (chosen && !chosen.querySelector(":checked")) chosen.querySelector(`[value="${next}"]`).checked = true;
}

function clearPlaces() {
  for (const radio of document.querySelectorAll(".places :checked")) radio.checked = false;
}

document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("textarea, input:not([type=radio], [type=checkbox])");
  if (writing && event.key === "Escape") document.querySelector(".note summary").focus();
  if (writing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const shortcuts = document.getElementById("shortcuts");
  if (shortcuts && !shortcuts.checked) return;
  if (event.key === "Enter" && event.target.matches("button, a, summary")) return;
  if (event.key.startsWith("Arrow") && event.target.matches("input")) return;
  const ranking = document.querySelector(".places");
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const target = [...document.querySelectorAll("[data-keys]")].find((each) => each.dataset.keys.split(" ").includes(key));
  if (target) {
    event.preventDefault();
    target.click();
    if (target.matches("summary") && target.parentElement.open) document.getElementById("note").focus();
  } else if (ranking && /^[1-9]$/.test(key)) {
    place(Number(key));
  } else if (ranking && key === "Backspace") {
    clearPlaces();
  }
});

function prepare() {
  for (const box of document.querySelectorAll("[data-remember]")) {
    const kept = localStorage.getItem(box.id);
    if (kept !== null) box.checked = kept === "on";
    box.addEventListener("change", () => localStorage.setItem(box.id, box.checked ? "on" : "off"));
  }
}

prepare();

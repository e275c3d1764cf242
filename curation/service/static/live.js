// Says so when what is shown may be old: htmx itself keeps silent and tries again.
"use strict";
const failed = new Set(); // the parts of the page whose last try failed
const tried = ({ detail }, renewed) => {
  failed[renewed ? "delete" : "add"](detail.target.id);
  document.getElementById("stale").hidden = failed.size === 0;
};
document.addEventListener("htmx:sendError", (event) => tried(event, false));
document.addEventListener("htmx:afterOnLoad", (event) => tried(event, event.detail.xhr.status < 400));

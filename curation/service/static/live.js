// Says so when what is shown may be old: htmx itself keeps silent and tries again.
"use strict";
const show = (stale) => { document.getElementById("stale").hidden = !stale; };
document.addEventListener("htmx:sendError", () => show(true));
document.addEventListener("htmx:afterOnLoad", (event) => show(event.detail.xhr.status >= 400));

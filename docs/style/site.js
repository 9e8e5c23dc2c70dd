"use strict";
// What is wider than its place can be scrolled with the keyboard too.
const scrolling = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const each of document.querySelectorAll("article pre, .table-wrapper")) scrolling.observe(each);

// Keeps the page of a workflow that is under way up to date. Without it the page works, and is reloaded by hand.
(function () {
  'use strict';
  var POLL_MILLISECONDS = 2000, region = document.getElementById('workflow-live');
  if (!region) { return; }

  // a link to a record opens it
  function openTarget() {
    var target = /^#record-/.test(location.hash) && document.getElementById(location.hash.slice(1));
    if (target) { target.open = true; target.scrollIntoView({block: 'nearest'}); }
  }
  window.addEventListener('hashchange', openTarget);
  openTarget();

  function isInUse() {
    return region.querySelector('.wf-action[open]') !== null || region.contains(document.activeElement) &&
      /^(INPUT|TEXTAREA|SELECT|BUTTON)$/.test(document.activeElement.tagName) || String(getSelection()) !== '';
  }

  function replace(html) {
    var open = Array.prototype.map.call(region.querySelectorAll('details[open]'), function (each) { return each.id; });
    var focused = document.activeElement && document.activeElement.closest('details');
    region.innerHTML = html;
    open.forEach(function (id) {
      var each = id && document.getElementById(id);
      if (each) { each.open = true; }
    });
    var again = focused && focused.id && document.getElementById(focused.id);
    if (again) { again.querySelector('summary').focus({preventScroll: true}); }
  }

  function poll() {
    var state = document.getElementById('workflow-state');
    if (!state || state.dataset.live !== 'yes') { return; }
    if (document.hidden || isInUse()) { setTimeout(poll, POLL_MILLISECONDS); return; }
    var url = new URL(location.href);
    url.hash = '';
    url.searchParams.set('fragment', '1');
    fetch(url, {credentials: 'same-origin'}).then(function (response) {
      return response.ok ? response.text() : null;
    }).then(function (html) {
      if (html !== null && !isInUse()) { replace(html); }
    }).catch(function () { /* Flower is away for a while */ }).then(function () {
      setTimeout(poll, POLL_MILLISECONDS);
    });
  }
  setTimeout(poll, POLL_MILLISECONDS);
}());

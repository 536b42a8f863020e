// What the page does by itself: clips in step, heads and tokens chosen by clicking, copying code.
// Everything is delegated from the document, because the page replaces its parts.
(() => {
  const clips = (player) => [...player.querySelectorAll("video")];

  const show = (player) => {
    const [first] = clips(player);
    const length = first.duration || 0;
    player.querySelector("[data-seek]").value = length ? (1000 * first.currentTime) / length : 0;
    player.querySelector("[data-time]").textContent = `${first.currentTime.toFixed(1)} s`;
  };

  const follow = (player) => {
    const [first, ...others] = clips(player);
    if (!player.isConnected || first.paused) return;
    for (const other of others) {
      const gap = other.currentTime - first.currentTime;
      if (Math.abs(gap) > 0.04 && Math.abs(gap) < first.duration - 0.1) other.currentTime = first.currentTime;
      if (other.paused) other.play().catch(() => {});
    }
    show(player);
    requestAnimationFrame(() => follow(player));
  };

  const play = (player, on) => {
    const button = player.querySelector("[data-play]");
    button.setAttribute("aria-pressed", on);
    button.textContent = on ? "Pause" : "Play";
    const all = clips(player);
    if (!on) {
      all.forEach((clip) => clip.pause());
      all.slice(1).forEach((clip) => (clip.currentTime = all[0].currentTime));
      return;
    }
    all.forEach((clip) => (clip.currentTime = all[0].currentTime));
    Promise.all(all.map((clip) => clip.play())).then(() => follow(player), () => {});
  };

  const field = (id) => document.querySelector(`#${id} textarea, #${id} input`);

  const write = (id, text) => {
    const input = field(id);
    if (!input) return;
    const kind = input.tagName === "TEXTAREA" ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(kind.prototype, "value").set.call(input, text);
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };

  const pairs = (text) => text.split(",").map((part) => part.trim()).filter(Boolean);

  const mark = (map) => {
    const input = field(map.dataset.target);
    const chosen = new Set(input ? pairs(input.value) : []);
    map.querySelectorAll("[data-head]").forEach((button) => {
      const pressed = String(chosen.has(button.dataset.head));
      if (button.getAttribute("aria-pressed") !== pressed) button.setAttribute("aria-pressed", pressed);
    });
  };

  const copy = async (button) => {
    const code = button.closest("section").querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(code);
    } catch {
      // Browsers offer the clipboard on secure pages alone, and this may be one of a local network.
      const area = Object.assign(document.createElement("textarea"), { value: code });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy as Python"), 1500);
  };

  document.addEventListener("click", (event) => {
    const target = event.target;
    if (!(target instanceof Element)) return;
    const button = target.closest("button");
    if (!button) return;
    if (button.id.endsWith("-start") && innerWidth < 768) {
      // On a phone what happens lies below the form.
      document.getElementById(button.id.replace("-start", "-status")).scrollIntoView({ block: "center" });
    }
    if (button.matches("[data-play]")) {
      play(button.closest("[data-player]"), button.getAttribute("aria-pressed") !== "true");
    } else if (button.matches("[data-copy]")) {
      copy(button);
    } else if (button.matches("[data-pick]")) {
      const tab = button.closest("[id$='-gallery']").id.replace("-gallery", "");
      write(`${tab}-picked`, button.dataset.pick);
    } else if (button.matches("[data-head]")) {
      const map = button.closest("[data-target]");
      const chosen = new Set(pairs(field(map.dataset.target).value));
      chosen.has(button.dataset.head) ? chosen.delete(button.dataset.head) : chosen.add(button.dataset.head);
      write(map.dataset.target, [...chosen].join(", "));
      mark(map);
    } else if (button.matches("[data-frames]")) {
      const [columns, frames, rows, width] = button.dataset.frames.split(",").map(Number);
      const image = button.querySelector("img");
      const box = image.getBoundingClientRect();
      const scale = image.naturalWidth / box.width;
      const gap = 6;
      const cellWidth = (image.naturalWidth + gap) / columns;
      const cellHeight = (image.naturalHeight + gap) / Math.ceil(frames / columns);
      const x = (event.clientX - box.left) * scale;
      const y = (event.clientY - box.top) * scale;
      const frame = Math.floor(y / cellHeight) * columns + Math.floor(x / cellWidth);
      const row = Math.floor(((y % cellHeight) / (cellHeight - gap)) * rows);
      const column = Math.floor(((x % cellWidth) / (cellWidth - gap)) * width);
      if (event.detail && frame < frames && row < rows && column < width) {
        write(button.dataset.target, `${frame}, ${row}, ${column}`);
      }
    }
  });

  document.addEventListener("input", (event) => {
    if (event.target instanceof Element && event.target.matches("[data-seek]")) {
      const player = event.target.closest("[data-player]");
      play(player, false);
      const time = (event.target.value / 1000) * (clips(player)[0].duration || 0);
      clips(player).forEach((clip) => (clip.currentTime = time));
      player.querySelector("[data-time]").textContent = `${time.toFixed(1)} s`;
    } else {
      document.querySelectorAll(".da-heads").forEach(mark);
    }
  });

  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const begun = new WeakSet();
  new MutationObserver(() => {
    document.querySelectorAll("[data-player]").forEach((player) => {
      if (begun.has(player) || !clips(player).length) return;
      begun.add(player);
      if (!still) play(player, true);
    });
    document.querySelectorAll(".da-heads").forEach(mark);
  }).observe(document.documentElement, { childList: true, subtree: true });
})();

"""How the page of `mimo demo --web` looks, in light and dark."""

# of the machine, none from the net
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

# greys are the theme's, so that both of its faces look right; the kinds of tokens and layers have their own colours
CSS = """
:root { --k-text: #8a94a6; --k-image: #2a9d8f; --k-video: #7c5cd6; --k-audio: #e08a1e; --k-padding: #c9ced6;
  --k-global: #3b6fd4; --k-sliding: #58b4d1; --k-error: #d64545; }
.text { background: var(--k-text); }
.image { background: var(--k-image); }
.video { background: var(--k-video); }
.audio { background: var(--k-audio); }
.padding { background: var(--k-padding); }
.global { background: var(--k-global); }
.sliding { background: var(--k-sliding); }
.whole { background: var(--k-text); }
.taken { background: var(--k-image); }

/* the frame: a line on top, below it the conversation and the panels in the rest of the window */
.gradio-container { padding: 10px 18px 12px !important; }
.gradio-container .main { padding: 0 !important; }
footer { display: none !important; }
#top { align-items: center; height: 34px; }
#top .html-container { padding: 0; }
#head { display: flex; align-items: baseline; gap: 14px; white-space: nowrap; overflow: hidden; }
#head b { font-size: 20px; color: var(--body-text-color); }
#head span { color: var(--body-text-color-subdued); font-size: 13px; overflow: hidden; text-overflow: ellipsis; }
#new { flex: 0 0 auto; min-width: 0; padding: 5px 14px; }
#work { height: calc(100vh - 72px); min-height: 480px; gap: 14px; flex-wrap: nowrap; }
#talk { height: 100%; gap: 8px; flex-wrap: nowrap; }
#chat { flex: 1 1 0 !important; height: auto !important; min-height: 160px; }
#chat .message-buttons { display: none; }
#chat .prose { font-size: 14px; }
#chat img, #chat video { max-height: 190px; width: auto; max-width: 100%; }
#examples { gap: 6px; flex-wrap: wrap; align-items: center; }
#examples button { min-width: 0; flex: 0 1 auto; font-weight: 400; border-radius: 999px; padding: 3px 12px; }
#notice .html-container { padding: 0 4px; min-height: 19px; }
#notice span { font-size: 13px; color: var(--body-text-color-subdued); }
#notice .error { color: var(--k-error); }

#side { height: 100%; gap: 10px; flex-wrap: nowrap; overflow-y: auto; }
#side .card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: 10px 14px; gap: 8px; flex: 0 0 auto !important; }
#side .card.grows { flex: 1 1 0 !important; min-height: 150px; overflow: hidden; }
#side .html-container { padding: 0; }
#side .card.grows :is(#layout, .html-container, .prose, .panel) { display: flex; flex-direction: column; }
#side .card.grows :is(#layout, .html-container, .prose, .panel) { flex: 1 1 0; min-height: 0; }
#side .card.grows .wrap { display: none; }
#draft, #think { background: none; border: 0; box-shadow: none; padding: 0; }
#draft label, #think label { font-size: 13px; }
#examples .form { flex: 0 0 auto; width: auto; min-width: 0 !important; margin-left: auto; }
#think { flex: 0 0 auto; width: auto; min-width: 0 !important; }
.form:has(#draft, #think) { background: none; border: 0; box-shadow: none; }
@media (max-width: 880px) {
  #work { height: auto; flex-wrap: wrap; }
  #chat { height: 55vh !important; flex: none !important; }
  #side .card.grows { max-height: 320px; }
}

.panel { font-size: 13px; color: var(--body-text-color); min-height: 0; }
.panel h3 { margin: 0 0 6px; font-size: 13px; font-weight: 600; }
.panel h3 { display: flex; justify-content: space-between; gap: 8px; }
.panel h3 small, .panel .quiet { font-weight: 400; font-size: 12px; color: var(--body-text-color-subdued); }
.panel .under { margin-top: 6px; }
/* reversed, so that it opens at its end, where the last question is */
.layout .scroll { display: flex; flex-direction: column-reverse; overflow: auto; flex: 1 1 0; min-height: 0; }
.layout .scroll table { margin-bottom: auto !important; }
.strip { display: flex; flex: none; height: 14px; border-radius: 4px; overflow: hidden; margin-bottom: 8px; gap: 1px; }
.strip i { min-width: 2px; }
.panel table { width: 100%; border-collapse: collapse; font-size: 12px; margin: 0 !important; }
.panel :is(table, tr, td) { border: 0 !important; }
.panel td { padding: 2px 8px 2px 0 !important; vertical-align: top; white-space: nowrap; }
.panel td.wide { width: 99%; white-space: normal; overflow-wrap: anywhere; }
.panel td.wide { font-family: var(--font-mono); font-size: 11px; }
.panel td.number { text-align: right; font-variant-numeric: tabular-nums; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 5px; }
.facts { display: flex; gap: 22px; margin: 4px 0 8px; }
.facts b { display: block; font-size: 21px; line-height: 1.15; font-variant-numeric: tabular-nums; }
.facts span { font-size: 11px; color: var(--body-text-color-subdued); }
.rows { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 10px; align-items: center; }
.rows { font-size: 12px; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 12px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.bar i { display: block; }
"""

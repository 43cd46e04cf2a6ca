"""The report's page, as a Jinja template.

SPDX-License-Identifier: Apache-2.0

A Python string and no file of its own: Flower's bundle takes no templates, and a deployment runs from the bundle.
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>synthward report: {{ r.run }}</title>
<style>
:root { --ink:#1c2430; --soft:#5b6675; --line:#dde3ea; --card:#fff; --page:#f4f6f9; --accent:#0b5c8a; }
* { box-sizing:border-box; }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width:1080px; margin:0 auto; padding:24px 16px 64px; }
h1 { font-size:1.7rem; margin:0 0 4px; } h2 { font-size:1.2rem; margin:0 0 12px; }
.sub { color:var(--soft); margin:0 0 20px; overflow-wrap:anywhere; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:20px; margin:0 0 18px; }
.banner { background:#fff4d6; border-color:#e8c766; font-weight:600; }
.heads { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:0 0 18px; }
.heads div { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:14px 16px; }
.heads b { display:block; font-size:1.5rem; color:var(--accent); line-height:1.25; } .heads span { color:var(--soft); font-size:.88rem; }
figure { margin:0 0 16px; } figcaption { font-size:.92rem; color:var(--soft); margin-bottom:4px; }
img { width:100%; image-rendering:pixelated; border-radius:4px; display:block; }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(300px,1fr)); gap:16px; } svg { width:100%; height:auto; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-size:.93rem; font-variant-numeric:tabular-nums; }
caption { text-align:left; color:var(--soft); font-size:.9rem; padding-bottom:6px; }
th, td { text-align:left; padding:6px 12px 6px 0; border-bottom:1px solid var(--line); vertical-align:top; white-space:nowrap; }
td.wrap { white-space:normal; min-width:220px; }
pre { overflow-x:auto; background:var(--page); padding:12px; border-radius:6px; font-size:.82rem; } .note { color:var(--soft); font-size:.92rem; }
@media print { body { background:#fff; } section, .heads div { break-inside:avoid; } }
</style>
</head>
<body><main>
<h1>{{ r.study.study.name }}: synthetic image set</h1>
<p class="sub">{{ r.study.study.description or r.study.study.modality }} · run {{ r.run }} · finished {{ r.finished }} · study {{ claim.study_sha256 }}</p>
{% if claim.phantoms %}
<section class="banner">PHANTOMS. The sites of this run held procedurally drawn images; no patient is involved, and no figure here speaks about real images.</section>
{% endif %}
<div class="heads">
<div><b>{{ claim.epsilon_max|up }}</b><span>epsilon, per {{ claim.unit }} and per site (delta {{ claim.delta }})</span></div>
{% if claim.sites|length > 1 %}
<div><b>{{ claim.epsilon_sum|up }}</b><span>epsilon of a person {{ "with one image" if claim.unit == "image" else "who is a patient" }} at every site: the sum (delta {{ claim.delta_sum }})</span></div>
{% endif %}
<div><b>{{ "%.3f"|format(r.validation[0].auc_macro.value) if r.validation[0].auc_macro.value == r.validation[0].auc_macro.value else "–" }}</b><span>AUC on held-out images, classifier trained on synthetic ones</span></div>
<div><b>{{ "%.3f"|format(r.validation[0].f1_macro.value) if r.validation[0].f1_macro.value == r.validation[0].f1_macro.value else "–" }}</b><span>macro F1, the same</span></div>
<div><b>{{ r.synthetic|length }}</b><span>synthetic images, {{ r.study.data.classes|length }} classes</span></div>
<div><b>{{ "%.1f"|format(r.minutes) }}</b><span>minutes; peak memory {{ "%.0f"|format(r.peak_memory_mb) }} MB</span></div>
</div>

<section><h2>Synthetic images</h2>
{% for name, number, uri in sheets %}
<figure><figcaption>{{ name }}: {{ number }} images, the first ones shown</figcaption><img src="{{ uri }}" alt="Synthetic images of the class {{ name }}"></figure>
{% endfor %}
<p class="note">Drawn by a model trained with epsilon {{ claim.epsilon_max|up }}, per {{ claim.unit }} and per site. No real image is on this page.</p>
</section>

<section><h2>Do the biomarkers survive?</h2>
<div class="scroll"><table><caption>Tested on the sites' held-out {{ "phantom" if claim.phantoms else "real" }} images; 95 % intervals hold both the sampling error and the privacy noise.</caption>
<tr><th scope="col">classifier</th><th scope="col">AUC</th><th scope="col">macro F1</th></tr>
{% for row in r.validation %}<tr><td class="wrap">{{ row.name }}</td><td>{{ row.auc_macro|estimate }}</td><td>{{ row.f1_macro|estimate }}</td></tr>
{% endfor %}</table></div>
{% for row in r.validation if row.figures %}
<div class="scroll"><table><caption>{{ row.name }}, one class against the rest</caption>
<tr><th scope="col">class</th><th scope="col">AUC</th><th scope="col">sensitivity</th><th scope="col">specificity</th><th scope="col">records (noisy)</th></tr>
{% for name in r.study.data.classes %}<tr><td>{{ name }}</td><td>{{ row.figures.auc[loop.index0]|estimate }}</td><td>{{ row.figures.sensitivity[loop.index0]|estimate }}</td><td>{{ row.figures.specificity[loop.index0]|estimate }}</td><td>{{ "%.0f"|format(row.figures.support[loop.index0].value) }}</td></tr>
{% endfor %}</table></div>
{% endfor %}
<p class="note">The reference was trained at each site on its own images with its own share of the budget, since its figures would otherwise tell about single records; without privacy a classifier reaches more. Chance draws classes at their prevalence. A classifier can do well on blurred images: judge the pictures above, too.</p>
</section>

<section><h2>Training</h2>
{% if charts %}
<div class="pair"><figure><figcaption>Loss: a noisy mean, part of the same private release as the gradient</figcaption>{{ charts.loss }}</figure>
<figure><figcaption>Epsilon spent on training records, by site</figcaption>{{ charts.epsilon }}</figure></div>
{% else %}<p>No round was finished.</p>{% endif %}
<div class="scroll"><table><caption>Sites; counts are noisy</caption>
<tr><th scope="col">site</th>{% for name in r.study.data.classes %}<th scope="col">{{ name }}</th>{% endfor %}<th scope="col">rounds used</th><th scope="col">rounds left out</th><th scope="col">AUC there</th></tr>
{% for row in r.sites %}<tr><td>{{ row.site }}</td>{% for count in row.counts %}<td>{{ "%.0f"|format(count) }}</td>{% endfor %}<td>{{ row.rounds_in }}</td><td>{{ row.rounds_out }}</td><td>{{ row.auc|estimate }}</td></tr>
{% endfor %}</table></div>
{% for warning in r.warnings %}<p class="note">Note: {{ warning }}</p>
{% endfor %}
</section>

<section><h2>Privacy statement</h2>
<p>{{ claim.statement }}</p>
<div class="scroll"><table><caption>Epsilon by site (delta {{ claim.delta }}, ceiling {{ claim.epsilon_ceiling }}), rounded up</caption>
<tr><th scope="col">site</th><th scope="col">training records</th><th scope="col">held-out records</th><th scope="col">the larger</th><th scope="col">from</th></tr>
{% for site in claim.sites %}<tr><td>{{ site.site }}</td><td>{{ site.epsilon_train|up }}</td><td>{{ site.epsilon_holdout|up }}</td><td>{{ site.epsilon|up }}</td><td>{{ "the site's ledger" if site.basis == "ledger" else "the plan (upper bound: its last answer is missing)" }}</td></tr>
{% endfor %}</table></div>
<div class="scroll"><table><caption>Against whom; trust model {{ claim.trust_model }}</caption>
<tr><th scope="col">observer</th><th scope="col">epsilon</th><th scope="col">delta</th><th scope="col">sees</th><th scope="col">why</th></tr>
{% for o in claim.observers %}<tr><td>{{ o.who }}</td>{% if o.epsilon is none %}<td>no promise</td><td>–</td>{% else %}<td>{{ o.epsilon|up }}</td><td>{{ o.delta }}</td>{% endif %}<td class="wrap">{{ o.sees }}</td><td class="wrap">{{ o.why }}</td></tr>
{% endfor %}</table></div>
<div class="scroll"><table><caption>Mechanisms: Gaussian noise of standard deviation noise_multiplier × sensitivity on sums over records</caption>
<tr><th scope="col">name</th><th scope="col">records</th><th scope="col">noise_multiplier</th><th scope="col">sensitivity</th><th scope="col">sample_rate</th><th scope="col">steps at most</th><th scope="col">what it releases</th></tr>
{% for m in claim.mechanisms %}<tr><td>{{ m.name }}</td><td>{{ m.partition }}</td><td>{{ "%.4f"|format(m.noise_multiplier) }}</td><td>{{ "%.4g"|format(m.sensitivity) }}</td><td>{{ m.sample_rate }}</td><td>{{ m.steps }}</td><td class="wrap">{{ m.meaning }}</td></tr>
{% endfor %}</table></div>
<p class="note">Accountant: {{ claim.accountant|upper }}, {{ claim.accountant_version }}. Tuning: {{ claim.tuning.meaning }}.{% if claim.begun %} Sites were asked from {{ claim.begun }}{{ " to " + claim.ended if claim.ended }}.{% endif %} Composition, post-processing and all other fields: claim.json.</p>
<p class="note">Not protected: {{ claim.unprotected|join("; ") }}. Random source of the noise: {{ claim.random_source }}. Libraries: {% for name, version in claim.libraries.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}.</p>
</section>

<section><h2>How it was run</h2>
<p class="note">{{ r.machine }}. The folder of this report holds the set as <code>images.npz</code> and PNGs, the figures as <code>metrics.json</code>, the statement as <code>claim.json</code>, and checksums; <code>synthward verify</code> checks them.</p>
<pre>{{ settings }}</pre>
</section>
</main></body></html>
"""

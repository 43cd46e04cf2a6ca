"""The page's HTML, as a Jinja template; autoescaping is on.

SPDX-License-Identifier: Apache-2.0
"""

TEMPLATE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>synthward: privacy account</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; max-width: 900px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.25em; margin: 2em 0 .4em; border-bottom: 2px solid #1f4e79 }
h3 { font-size: 1.05em; margin: 1.4em 0 .3em } .sub, .note { color: #5a6675 } .note { font-size: .9em }
.figures { display: flex; gap: 1em; flex-wrap: wrap } .figures div { background: #f3f5f8; padding: .6em 1em; border-radius: 6px; flex: 1 }
.figures b { display: block; font-size: 1.5em } table { border-collapse: collapse; width: 100%; margin: .4em 0 }
th, td { text-align: left; padding: .25em .6em; border-bottom: 1px solid #dde3ea; vertical-align: top } th { color: #5a6675; font-weight: 600 }
td.n, th.n { text-align: right } .yes { color: #1b6e3c; font-weight: 600 } .no { color: #a33; font-weight: 600 }
.problem { background: #fbeaea; border-left: 4px solid #a33; padding: .6em 1em } code { word-break: break-all }
svg { max-width: 100%; height: auto }
</style></head><body>
<h1>Privacy account</h1>
<p class="sub">What was asked of this hospital's images, what was allowed or refused, and what it has cost. Shown on this computer only; nothing can be changed here.</p>
<p><b>Epsilon</b> limits how sure anybody can become that one certain person's image was used, from everything that ever left this hospital: from 50&nbsp;% to at most 73&nbsp;% at 1, 95&nbsp;% at 3, 99.97&nbsp;% at 8. It only ever grows. At the ceiling this hospital stops by itself.</p>
{% for v in views %}
<h2>{{ v.name }}</h2>
{% if v.problem %}<p class="problem">{{ v.problem }}</p>{% endif %}
{% if v.account %}
{% set a = v.account %}
<div class="figures">
<div><b>{{ "%.2f"|format(a.epsilon.train) }}</b>spent on images used for training</div>
<div><b>{{ "%.2f"|format(a.epsilon.holdout) }}</b>spent on images kept for testing</div>
<div><b>{{ "%.2f"|format(a.left) }}</b>left under the ceiling of {{ "%g"|format(a.ceiling) }} (delta {{ a.delta }})</div>
</div>
{% if v.name in charts %}{{ charts[v.name] }}
<p class="note">Blue: images used for training. Yellow: images kept for testing. An image is one or the other. {{ a.curve|length }} points; the last is exact to the newest entry.</p>{% endif %}
{% if not a.studies %}<p>No study has asked for anything yet.</p>{% endif %}
{% for s in a.studies %}
<h3>Study {{ s.name }} <span class="{{ "yes" if s.approved else "no" }}">{{ "approved" if s.approved else ("approval revoked" if s.decisions else "not approved") }}</span></h3>
<p class="note">SHA-256 <code>{{ s.sha256 }}</code></p>
{% for d in s.decisions %}<p class="note">{{ d.at }}: {{ d.kind }} by {{ d.by }}</p>{% endfor %}
{% if s.stages %}
<table><tr><th>what left</th><th>images</th><th class="n">asked</th><th class="n">finished</th><th class="n">noisy answers</th><th class="n">epsilon alone</th></tr>
{% for t in s.stages %}<tr><td>{{ t.name }}</td><td>{{ "training" if t.partition == "train" else "testing" }}</td><td class="n">{{ t.asked }}</td><td class="n">{{ t.finished }}</td><td class="n">{{ t.steps }}</td><td class="n">{{ "%.3f"|format(t.epsilon) }}</td></tr>
{% endfor %}</table>
<p>Together: epsilon {{ "%.2f"|format(s.epsilon.train) }} (training) and {{ "%.2f"|format(s.epsilon.holdout) }} (testing). What was asked and not finished counts all the same.</p>
{% else %}<p>Nothing was given to it.</p>{% endif %}
{% if s.refusals %}
<p><span class="no">Refused {{ s.refusals|length }} times.</span></p>
<table><tr><th>when</th><th>rule</th><th>why</th></tr>
{% for r in s.refusals[-10:] %}<tr><td>{{ r.at }}</td><td>{{ r.rule }}</td><td>{{ r.what }}</td></tr>
{% endfor %}</table>{% endif %}
{% endfor %}
<p class="note">The ledger has {{ a.entries }} entries, and the chain of their seals is unbroken. Newest seal: <code>{{ a.newest_hash }}</code>. Noted on paper, it proves later that nothing up to here was changed.</p>
{% endif %}
{% if v.policy %}
{% set p = v.policy %}
<h3>Policy in force</h3>
<table>
<tr><td>all studies together</td><td>epsilon {{ "%g"|format(p.max_epsilon) }} at delta {{ p.max_delta }}</td></tr>
<tr><td>a single study</td><td>epsilon {{ "%g"|format(p.max_study_epsilon) }} at delta {{ p.max_study_delta }}; one stage at most {{ "%.0f"|format(100 * p.max_stage_share) }} % of it</td></tr>
<tr><td>smallest number of units</td><td>{{ p.min_units }}, and {{ p.min_units_per_class }} in each class</td></tr>
<tr><td>what has to be protected</td><td>{{ "whole patients, where they are known" if p.unit != "image" else "single images" }}</td></tr>
<tr><td>approval needed</td><td>always</td></tr>
<tr><td>studies</td><td>{{ p.allowed_studies|join(", ") or "any that is approved" }}</td></tr>
<tr><td>what may leave</td><td>{{ p.allowed_mechanisms|join(", ") }}; exact figures: never</td></tr>
</table>{% endif %}
{% endfor %}
</body></html>
"""

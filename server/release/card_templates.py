"""The words of a release's documents, as Jinja templates over `server/release/facts.py`.

SPDX-License-Identifier: Apache-2.0

Python strings and no files of their own: Flower's bundle takes no templates, and a deployment runs from the bundle.
"""

_FIRST = """\
{% if claim.phantoms %}
> **PHANTOMS.** The sites of this run held procedurally drawn images. No patient is behind anything here, and no figure
> speaks about real images.

{% endif %}
{% if not claim.protects %}
> **NOTHING IS PROTECTED.** The noise of this run came from a known seed, for tests.

{% endif %}
{% if f.unmet %}
> **Below its study's own limits:** {{ f.unmet|join("; ")|md }}. `synthward release` gives it to nobody.

{% endif %}
"""

_LICENCE_HEAD = """\
license: {{ f.hugging_face_licence }}
{% if f.hugging_face_licence == "other" %}
license_name: {{ study.release.licence|lower|yaml }}
{% if f.licence_address %}
license_link: {{ f.licence_address|yaml }}
{% endif %}
{% endif %}
"""

_LICENCE = """\
{% if study.release.licence %}
{{ study.release.licence }}{% if f.licence_address %}, <{{ f.licence_address }}>{% endif %}, chosen by the study for the images and the weights.
{% else %}
The study gives none: ask {{ (study.release.contact or "whoever gave you this folder")|md }} before you use it.
{% endif %}
"""

_PRIVACY = """\
{{ claim.statement|md }}

| site | epsilon of training records | of held-out records | the larger | from |
|---|---|---|---|---|
{% for site in claim.sites %}
| {{ site.site|md }} | {{ site.epsilon_train|up }} | {{ site.epsilon_holdout|up }} | {{ site.epsilon|up }} | {{ "its ledger" if site.basis == "ledger" else "the plan, an upper bound" }} |
{% endfor %}

At delta {{ claim.delta }}, per {{ claim.unit }} and per site; rounded up. `claim.json` has every parameter.
Not covered: {{ claim.unprotected|join("; ")|md }}.
"""

_FIGURES = """\
| classifier, tested on the sites' held-out {{ "phantoms" if claim.phantoms else "real images" }} | AUC | macro F1 |
|---|---|---|
{% for row in metrics.validation %}
| {{ row.name|md }} | {{ row.auc_macro|figure }} | {{ row.f1_macro|figure }} |
{% endfor %}

In brackets: 95 % intervals, which hold the sampling error and the privacy noise.
"""

DATASET = (
    """\
---
pretty_name: {{ f.title|yaml }}
"""
    + _LICENCE_HEAD
    + """\
task_categories:
- image-classification
tags:
- synthetic
- medical
- differential-privacy
{% if claim.phantoms %}
- phantoms
{% endif %}
annotations_creators:
- machine-generated
size_categories:
- {{ f.size }}
configs:
- config_name: default
  data_files:
  - split: train
    path: images/**
---

# {{ f.title|md }}

"""
    + _FIRST
    + """\
{{ f.essence|md }}
{% if study.study.description %}

The study says of itself: {{ study.study.description|md }}
{% endif %}

## Privacy

"""
    + _PRIVACY
    + """\

## What it is worth

"""
    + _FIGURES
    + """\

A classifier can do well on blurred images: look at `report.html`, too. Fitness for any other use was not measured.

## What is here

| file | what it is |
|---|---|
| `images.npz` | the set in MedMNIST's layout; its val and test parts are empty: test on real images |
| `images/` | the same as PNG, a folder for each class, with `metadata.csv` (`load_dataset` and `imagefolder` read it) |
| `generator/` | the weights that drew them, with their settings and a card of their own |
| `claim.json`, `report.html`, `metrics.json` | the privacy claim; a page for people; all other figures |
| `DATASHEET.md`, `croissant.json`, `CITATION.cff` | where it comes from, for people, machines and reference lists |
| `study.toml` | the settings that all parties agreed on (SHA-256 {{ study.sha256 }}) |
| `dicom/` | only where it was asked for: the set as DICOM Secondary Capture, marked as synthetic |
| `SHA256SUMS` | checksums of all of these: `synthward verify FOLDER`, or `sha256sum --check SHA256SUMS` |

| class | label | images |
|---|---|---|
{% for name, count in metrics.classes.items() %}
| {{ name|md }} | {{ loop.index0 }} | {{ count }} |
{% endfor %}

## Licence

"""
    + _LICENCE
)

DATASHEET = (
    """\
# Datasheet: {{ f.title|md }}

"""
    + _FIRST
    + """\
The questions are those of Gebru et al. (2021), "Datasheets for Datasets"; what the study does not say is said to be unsaid.

## Motivation

- For what? To share images of {{ study.study.modality }} from which classifiers can be trained, without sharing any
  record of the sites. {{ ("The study says: " ~ study.study.description)|md if study.study.description else "The study says no more." }}
- By whom? {{ f.authors|join(", ")|md }}.{% if study.release.contact %} Contact: {{ study.release.contact|md }}.{% endif %}


## Composition

- {{ metrics.images }} synthetic images, {{ study.data.image_size }} x {{ study.data.image_size }} px, {{ f.colour }}, 8 bits; one label each.
{% for name, count in metrics.classes.items() %}
- {{ name|md }}: {{ count }}
{% endfor %}
- Classes are {{ "as many of each" if study.generation.balance == "even" else "in proportion to the sites' noisy counts" }}. There is one part, for training; nothing here is to test on.
- No image shows a person. A label is what the image was drawn for: nobody has looked at each one.
- No personal data is meant to be in it; how much it can tell of any one {{ claim.unit }} is bounded by the claim below.

## Collection

- {{ claim.sites|length }} {{ "sites" if claim.sites|length > 1 else "site" }} ({{ claim.sites|map(attribute="site")|join(", ")|md }}) held {{ "phantoms, drawn by a program" if claim.phantoms else "the records, which never left them" }}. Only noisy sums left them{% if claim.begun %}, from {{ claim.begun }}{{ " to " ~ claim.ended if claim.ended else "" }}{% endif %}.
- {{ metrics.rounds }} rounds of training at the sites.{% if claim.public_sha256 %} The network learnt from a file, too, that the coordinator holds to be public (SHA-256 {{ claim.public_sha256 }}): the people in it are not covered by the claim.{% endif %}

- {{ claim.tuning.meaning[0]|upper }}{{ claim.tuning.meaning[1:]|md }}.
- Whether a site's patients consented, or an ethics board agreed, is for the sites to say: this program does not know.

## Preprocessing and labels

- Drawn with {{ study.generation.sampler }}, {{ study.generation.steps }} steps{% if study.privacy.features_share > 0 and study.generation.candidates > 1 %}; of {{ study.generation.candidates }} images for each that is here those were kept that the sites' noisy features find most of their class{% endif %}.
- What else was done with the noisy answers: {{ claim.post_processing|join("; ")|md }}.

## Uses and limits

"""
    + _FIGURES
    + """\

- Known limits: small images; no claim of realism; rare findings may be missing or wrong; nothing here was made for a
  diagnosis or to judge a device.
- Whatever the sites' patients had in common, a set drawn from them has, too: groups that are few at the sites are few here.
- Do not try to find a person in it.

## Privacy

"""
    + _PRIVACY
    + """\

## Distribution and maintenance

- Licence: """
    + _LICENCE
    + """\
- A release is never changed. Withdrawn consent changes nothing in what is out; a new study makes a new release.
- {% if f.date %}Made on {{ f.date }}{% else %}Its date is not known{% endif %}, study {{ study.sha256 }}.
"""
)

MODEL = (
    """\
---
"""
    + _LICENCE_HEAD
    + """\
library_name: synthward
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- differential-privacy
- medical
---

# The generator of {{ f.title|md }}

"""
    + _FIRST
    + """\
`model.safetensors` are the weights that the images of this release were drawn from (the moving average over the training
steps; float32), `config.json` the network and the sampler. A U-Net of convolutions and Swin blocks, told the class, under
EDM's preconditioning; it draws {{ study.data.image_size }} x {{ study.data.image_size }} px, {{ f.colour }}.

```python
from pathlib import Path
from common.files import unpack_arrays
from common.model.diffusion_model import load_model
from common.study_file import load_study

weights = unpack_arrays(Path("generator/model.safetensors").read_bytes(), where="model.safetensors")
model = load_model(load_study(Path("study.toml")), weights)  # synthward {{ claim.libraries.get("synthward", "") }}
```

## Privacy

The same claim holds for the weights as for the images: whatever is drawn from them costs nothing more.

"""
    + _PRIVACY
    + """\

## What it is worth

Of images drawn from it:

"""
    + _FIGURES
    + """\

Not for a diagnosis, and not to judge a device. What it draws is no patient.

## Licence

"""
    + _LICENCE
)

CITATION = """\
cff-version: 1.2.0
message: Please cite this set as below.
type: dataset
title: {{ f.title|yaml }}
abstract: {{ f.summary|yaml }}
authors:
{% for name in f.authors %}
- name: {{ name|yaml }}
{% endfor %}
{% if f.date %}
date-released: '{{ f.date }}'
{% endif %}
{% if study.release.licence and not study.release.licence.startswith("LicenseRef-") %}
license: {{ study.release.licence }}
{% elif study.release.licence_url %}
license-url: {{ study.release.licence_url|yaml }}
{% endif %}
{% if study.release.url %}
url: {{ study.release.url|yaml }}
{% endif %}
identifiers:
- type: other
  value: {{ ("sha256:" ~ study.sha256)|yaml }}
  description: SHA-256 of the study that all parties agreed on
"""

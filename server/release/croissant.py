"""croissant.json: the release for dataset search engines and loaders.

SPDX-License-Identifier: Apache-2.0

Croissant 1.0 (http://mlcommons.org/croissant/1.0) with the terms of its RAI vocabulary
(http://mlcommons.org/croissant/RAI/1.0). What is not known is left out where the format lets it.
"""

from __future__ import annotations

from typing import Any

from server.release.facts import Facts

_TERMS = (  # of Croissant, without a type of their own
    "citeAs", "column", "dataBiases", "dataCollection", "extract", "field", "fileProperty", "fileObject", "fileSet",
    "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path",
    "personalSensitiveInformation", "recordSet", "references", "regex", "repeated", "replace", "separator", "source",
    "subField", "transform", "containedIn",
)  # fmt: skip
_CONTEXT: dict[str, Any] = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"}, "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, **{term: f"cr:{term}" for term in _TERMS},
}  # fmt: skip
_TABLE = "images/metadata.csv"


def croissant(facts: Facts, checksums: dict[str, str]) -> dict[str, Any]:
    """The JSON-LD of a release.

    Args:
        checksums: SHA-256 of the files that it names.
    """
    return {
        "@context": _CONTEXT, "@type": "sc:Dataset",
        "dct:conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": facts.title, "description": facts.summary, "url": facts.address,
        "license": facts.licence_address or "No licence is given: ask the creators.",
        "creator": [{"@type": "sc:Organization", "name": name} for name in facts.authors],
        "datePublished": facts.date, "version": "1.0.0", "isLiveDataset": False, "inLanguage": "en",
        "keywords": ["synthetic images", "differential privacy", facts.study.study.modality],
        "citeAs": f"{', '.join(facts.authors)}: {facts.title}. {facts.date}. Study {facts.study.sha256}",
        **_responsible(facts), "distribution": _files(checksums), "recordSet": _records(facts),
    }  # fmt: skip


def _responsible(facts: Facts) -> dict[str, Any]:
    """The RAI terms; each figure is the claim's."""
    claim, names = facts.claim, ", ".join(site.site for site in facts.claim.sites)
    held = "phantoms, drawn by a program" if claim.phantoms else "the records, which never left them"
    return {
        "rai:dataCollection": f"Sites ({names}) held {held}; only sums with noise on them left a site.",
        "rai:dataCollectionType": ["Others"],
        "rai:dataCollectionTimeframe": [date for date in (claim.begun, claim.ended) if date],
        "rai:dataPreprocessingProtocol": list(claim.post_processing),
        "rai:dataAnnotationProtocol": "A label is the class that an image was drawn for; nobody looked at each one.",
        "rai:machineAnnotationTools": ["synthward"],
        "rai:dataLimitations": [
            f"Images are {facts.study.data.image_size} px a side and synthetic: no patient, no diagnosis, no test set.",
            *(f"Below the study's own limit: {line}" for line in facts.unmet),
        ],
        "rai:dataBiases": ["Whatever the sites' records had in common, images drawn from them have, too."],
        "rai:dataUseCases": ["Training of classifiers for the classes named here; other uses were not measured."],
        "rai:personalSensitiveInformation": [claim.statement],
        "rai:dataSocialImpact": "To share what images of patients teach, without sharing an image of a patient.",
        "rai:dataReleaseMaintenancePlan": "A release is never changed; a new study makes a new one.",
    }


def _files(checksums: dict[str, str]) -> list[dict[str, Any]]:
    kinds = (
        ("images.npz", "application/zip", "The set in MedMNIST's layout, as NumPy arrays"),
        (_TABLE, "text/csv", "File name, label and class of every image"),
        ("generator/model.safetensors", "application/octet-stream", "The weights that drew the images"),
        ("claim.json", "application/json", "The privacy claim, with every parameter"),
        ("metrics.json", "application/json", "All other figures"),
    )
    objects = [
        {"@type": "cr:FileObject", "@id": name, "name": name, "description": words, "contentUrl": name,
         "encodingFormat": kind, "sha256": checksums[name]} for name, kind, words in kinds
    ]  # fmt: skip
    pictures = {"@type": "cr:FileSet", "@id": "image-files", "name": "image-files", "description": "The images as PNG",
                "encodingFormat": "image/png", "includes": "images/*/*.png"}  # fmt: skip
    return [*objects, pictures]


def _records(facts: Facts) -> list[dict[str, Any]]:
    names = facts.study.data.classes
    classes = {
        "@type": "cr:RecordSet", "@id": "classes", "name": "classes", "dataType": "sc:Enumeration",
        "description": "The classes, by label", "key": {"@id": "classes/label"},
        "field": [
            {"@type": "cr:Field", "@id": "classes/label", "name": "label", "dataType": "sc:Integer"},
            {"@type": "cr:Field", "@id": "classes/name", "name": "name", "dataType": "sc:Text"},
        ],
        "data": [{"classes/label": label, "classes/name": name} for label, name in enumerate(names)],
    }  # fmt: skip
    file = {"@type": "cr:Field", "@id": "images/file_name", "name": "file_name", "dataType": "sc:Text",
            "description": "Path of the PNG below images/", "source": _column("file_name")}  # fmt: skip
    label = {"@type": "cr:Field", "@id": "images/label", "name": "label", "dataType": ["sc:Integer", "cr:Label"],
             "description": "The class that the image was drawn for", "source": _column("label"),
             "references": {"field": {"@id": "classes/label"}}}  # fmt: skip
    image = {"@type": "cr:Field", "@id": "pictures/image", "name": "image", "dataType": "sc:ImageObject",
             "description": "The image", "source": {"fileSet": {"@id": "image-files"},
                                                    "extract": {"fileProperty": "content"}}}  # fmt: skip
    path = {"@type": "cr:Field", "@id": "pictures/path", "name": "path", "dataType": "sc:Text",
            "description": "Path of the PNG", "source": {"fileSet": {"@id": "image-files"},
                                                         "extract": {"fileProperty": "fullpath"}}}  # fmt: skip
    table = {"@type": "cr:RecordSet", "@id": "images", "name": "images", "description": "A row for every image",
             "key": {"@id": "images/file_name"}, "field": [file, label]}  # fmt: skip
    pictures = {"@type": "cr:RecordSet", "@id": "pictures", "name": "pictures", "description": "The images themselves",
                "field": [path, image]}  # fmt: skip
    return [classes, table, pictures]


def _column(name: str) -> dict[str, Any]:
    return {"fileObject": {"@id": _TABLE}, "extract": {"column": name}}

"""The synthetic set as DICOM files: Secondary Capture, marked as synthetic in the standard's own attribute.

SPDX-License-Identifier: Apache-2.0

No attribute of a patient or a visit is filled from anywhere; those that the standard wants there (type 2) are empty.
UIDs are hashes under the publisher's own root, and nothing is of the clock: the same set gives the same bytes. Written
with pydicom, which the extra `dicom` brings.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from server.release.facts import Facts

_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName",
    "StudyID", "AccessionNumber", "PatientOrientation",
)  # fmt: skip
_LONGEST = 64  # characters of a LO


def dicom_files(
    images: Iterable[tuple[bytes, int, str]], facts: Facts, *, root: str, digest: str
) -> Iterator[tuple[str, bytes]]:
    """(path below dicom/, bytes) of one file for each image, named as its PNG.

    Args:
        images: (pixels, label, PNG's name) in the order of the set.
        root: of all UIDs.
        digest: SHA-256 of images.npz: two sets never share a UID.
    """
    counters = [0] * len(facts.study.data.classes)
    for pixels, label, name in images:
        counters[label] += 1
        data = _file(pixels, label, counters[label], facts, root=root, digest=digest)
        yield PurePosixPath(name).with_suffix(".dcm").as_posix(), data


def _file(pixels: bytes, label: int, number: int, facts: Facts, *, root: str, digest: str) -> bytes:
    study = facts.study
    name, side, grey = study.data.classes[label], study.data.image_size, study.data.channels == 1

    def uid(*words: object) -> UID:
        return generate_uid(f"{root}.", entropy_srcs=["|".join(map(str, (digest, *words)))])

    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _EMPTY:
        setattr(image, keyword, "")
    image.SyntheticData = "YES"
    image.ConversionType, image.Modality, image.BurnedInAnnotation = "SYN", "OT", "NO"
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.SOPClassUID, image.SOPInstanceUID = SecondaryCaptureImageStorage, uid("image", label, number)
    image.StudyInstanceUID, image.SeriesInstanceUID = uid("study"), uid("series", label)
    image.SeriesNumber, image.InstanceNumber = label + 1, number
    image.Manufacturer = "synthward"
    image.StudyDescription, image.SeriesDescription = _short(facts.title), _short(name)
    image.ImageComments = f"Synthetic image, not a patient. Study {study.sha256}"
    image.SamplesPerPixel = 1 if grey else 3
    image.PhotometricInterpretation = "MONOCHROME2" if grey else "RGB"
    if not grey:
        image.PlanarConfiguration = 0
    image.Rows = image.Columns = side
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    image.add_new("PixelData", "OB", pixels + b"\0" * (len(pixels) % 2))  # values have an even length
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.ImplementationClassUID = UID(f"{root}.1")
    image.file_meta.ImplementationVersionName = "SYNTHWARD"  # not pydicom's, which has its version in it
    buffer = io.BytesIO()
    dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()


def _short(text: str) -> str:
    """As an attribute of one line may have it: a backslash would begin a second value."""
    return " ".join(text.replace("\\", "/").split())[:_LONGEST].strip()

"""What is particular to DICOM, by way of pydicom. readers.py decides what to open and names the file in every error."""
from dataclasses import dataclass, field

import numpy as np

DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg (the extra medssl[dicom] brings them)"
CD_INDEX = b"\2\0\2\0UI\x14\x001.2.840.10008.1.3.10"                        # the field that makes a file a DICOMDIR


@dataclass
class Head:
    """What a set needs to know of a DICOM file before it is read. Never print it: these name a person."""
    patient: str = field(repr=False)                                        # PatientID, "" if there is none
    series: str = field(repr=False)                                         # SeriesInstanceUID, "" if there is none
    picture: bool                                                           # holds one picture, not none and not frames


def opened(path, **words):
    """pydicom's data set."""
    try:
        import pydicom.pixels
    except ImportError:
        raise ValueError('DICOM needs pydicom 3: pip install "pydicom>=3" (or the extra medssl[dicom])') from None
    return pydicom.dcmread(path, **words)


def head(path):
    fields = opened(path, stop_before_pixels=True,
                    specific_tags=["PatientID", "SeriesInstanceUID", "NumberOfFrames", "Rows"])
    return Head(str(fields.get("PatientID") or "").strip(), str(fields.get("SeriesInstanceUID") or "").strip(),
                "Rows" in fields and int(fields.get("NumberOfFrames") or 1) == 1)


def picture(file, limit):
    """The values of an opened file, at most so many: gray with its slope and intercept applied, or colour."""
    if "PixelData" not in file:
        raise ValueError("is a DICOM file without a complete picture (DICOMDIR, reports and plans have none)")
    if "SharedFunctionalGroupsSequence" in file:
        raise ValueError("is an enhanced multi-frame DICOM, scaled frame by frame; convert it to NIfTI (dcm2niix does)")
    values = int(file.get("NumberOfFrames") or 1) * file.Rows * file.Columns * file.SamplesPerPixel
    if values > max(2 ** 24, 2200 * len(file.PixelData)):
        raise ValueError(f"declares {values} values, too many for its size to be true")
    if values > limit:
        raise ValueError(f"has {values} values; at most {limit} are read at once: export fewer frames")
    from pydicom import pixels
    syntax = file.file_meta.TransferSyntaxUID
    missing = syntax.is_encapsulated and pixels.get_decoder(syntax).missing_dependencies
    if missing and not pixels.get_decoder(syntax).is_available:
        raise ValueError(f"is packed as {syntax.name}, which needs a decoder: {DECODERS}")
    try:
        array = pixels.pixel_array(file)                                    # colour comes back as RGB
    except RuntimeError as error:                                           # what pydicom makes of a decoder's error
        raise ValueError(f"{error}{'; another decoder may do: ' + DECODERS if missing else ''}") from error
    if file.PhotometricInterpretation == "PALETTE COLOR":
        return pixels.apply_color_lut(array, file)
    return array if file.SamplesPerPixel > 1 else pixels.apply_modality_lut(array, file).astype(np.float64)


def in_order(paths, heads):
    """The files of one series as their slices lie in space, by number where one of them does not say; and where the
    volume's axes x, y and z point, (3, 3) in DICOM's coordinates (to the patient's left, back and head), or None."""
    if len({fields.get("SeriesInstanceUID") for fields in heads}) > 1:
        raise ValueError("slices of several DICOM series; give each series a folder of its own")
    numbers, axes = [float(fields.get("InstanceNumber") or 0) for fields in heads], None
    places = numbers
    if all("ImagePositionPatient" in fields and "ImageOrientationPatient" in fields for fields in heads):
        lines = np.array([fields.ImageOrientationPatient for fields in heads], float)       # (N, 6)
        if np.abs(lines - lines[0]).max() > 0.05:                           # three degrees
            raise ValueError("DICOM slices that are not parallel, as in a scout view: not one volume")
        row, column = lines[0].reshape(2, 3)
        axes = np.stack([row, column, np.cross(row, column)])               # (3, 3)
        places = [axes[2] @ np.array(fields.ImagePositionPatient, float) for fields in heads]
    order = sorted(range(len(paths)), key=lambda i: (places[i], numbers[i]))
    return [paths[i] for i in order], axes

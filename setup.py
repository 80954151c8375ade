from setuptools import setup

setup(
    name="medssl",
    version="1.0.0",
    description="Self-supervised pretraining for 2D medical images: one readable file a method",
    license="MIT",
    packages=["medssl", "medssl.common", "medssl.common.data", "medssl.common.evaluation"],
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "numpy>=1.24", "pillow>=10.1", "tqdm"],
    extras_require={"test": ["pytest"], "dicom": ["pydicom>=3"]},
)

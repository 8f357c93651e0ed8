"""What a run is good for, measured part by part: `gcrl evaluate RUN`.

Each part is a module of its name in this folder, with the same four functions:

    inputs(subject)           the options that its results follow from, ready for JSON
    measure(subject)          its results, ready for JSON
    table(results)            the results in Markdown
    draw(results, subject)    its pictures by name, matplotlib figures

suite.py runs them and keeps their results; subject.py says what is measured, features.py reads the
network, store.py keeps what was read, probe.py is the linear classifier that several parts share.
"""

from __future__ import annotations

# In this order: the later parts use what the earlier ones have trained.
PARTS = {
    "summary": "losses, linear probe and k-NN beside an untrained network and raw pixels",
    "classification": "linear probe on every layer, k-NN, few labels",
    "finetuning": "the whole network trained with labels, its generative loss kept or not",
    "likelihood": "nats and bits per pixel of each test image, the most and the least likely",
    "samples": "images drawn and completed; with --inception their Fréchet distance",
    "ood": "telling the images of --ood from the test images, by likelihood, encoding and probe",
    "calibration": "how far the confidence of the classifiers can be trusted",
    "corruption": "accuracy on corrupted test images, at five severities",
}

"""training/report.py: pages that need nothing beside them and show any text as it is."""
import re

import numpy as np

from training import report


def test_a_page_needs_nothing_beside_it_and_shows_any_text():
    name = report.text("<b>&.nii.gz")
    body = report.table(["file", "PSNR"], [["mean", "30"], [name, "30"]], means=1)
    page = report.page("title", "headline", [f"<p>{name}</p>"], [("30 dB", "PSNR")], body)
    assert page.count("&lt;b&gt;&amp;.nii.gz") == 2 and "<b>&" not in page
    assert page.count("<tr") == 3 and page.count('class="mean"') == 1
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_slices_of_a_volume_are_pictures_in_the_page():
    rng = np.random.default_rng(0)
    volume, recon = (rng.uniform(-1, 1, (1, 4, 6, 8)).astype(np.float32) for _ in range(2))
    label = rng.integers(0, 3, (4, 6, 8))
    row = {"file": "in/a.nii.gz", "volume": 2, "shape": [4, 6, 8], "psnr": 30.0, "dice": float("nan")}
    for found, truth, names in ((recon, None, ["Input", "Reconstruction", "Error"]),
                                (label, label, ["Input", "Label", "Found"])):
        columns = report.slices_of(volume, found, truth, -1.0, (1.0, 1.0, 1.0), False)
        figure = report.figure(row, columns)
        assert list(columns) == names and figure.count("<img") == 9
        assert all(f"<th>{name}</th>" in figure for name in names)
        assert "a.nii.gz, volume 2" in figure and "PSNR 30.00 dB" in figure and "Dice -" in figure
    flat = report.slices_of(volume[:, :1], recon[:, :1], None, -1.0, (1.0, 1.0, 1.0), False)
    assert report.figure(row, flat).count("<img") == 3           # one slice: the others are seen edge-on

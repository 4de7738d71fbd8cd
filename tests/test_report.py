"""training/report.py: pages that need nothing beside them and show any text as it is."""
import re

import torch

from training import report, views
from volumes.intensities import Intensity


def test_a_page_needs_nothing_beside_it_and_shows_any_text():
    name = report.text("<b>&.nii.gz")
    body = report.table(["file", "PSNR"], [["mean", "30"], [name, "30"]], means=1)
    page = report.page("title", "headline", [f"<p>{name}</p>"], [("30 dB", "PSNR")], body)
    assert page.count("&lt;b&gt;&amp;.nii.gz") == 2 and "<b>&" not in page
    assert page.count("<tr") == 3 and page.count('class="mean"') == 1
    assert not re.search(r"https?://|<script|<link|@import", page)


def test_views_of_a_volume_are_pictures_in_the_page():
    volume, recon = torch.rand(2, 1, 4, 6, 8) * 2 - 1
    label = torch.randint(0, 3, (4, 6, 8))
    row = {"file": "in/a.nii.gz", "volume": 2, "shape": [4, 6, 8], "psnr": 30.0, "dice": float("nan")}
    ct = Intensity("ct", (-1000.0,), (1000.0,))
    spacing = (1.0, 1.0, 1.0)
    for shown in (views.of_reconstruction(volume, recon, spacing, ct),
                  views.of_labels(volume, {"Label": label, "Found": label}, spacing, ct)):
        figure = report.figure(row, shown)
        assert len(shown.columns) == 3 and figure.count("<img") == 9
        assert all(f"<th>{name}</th>" in figure for name in shown.columns)
        assert "a.nii.gz, volume 2" in figure and "PSNR 30.00 dB" in figure and "Dice -" in figure
    flat = views.of_reconstruction(volume[:, :1], recon[:, :1], spacing, ct)
    assert report.figure(row, flat).count("<img") == 3           # one slice: the others are seen edge-on

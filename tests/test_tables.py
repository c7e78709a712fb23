"""Tables and plots of results, against cells and ticks worked by hand."""

import pytest

from analysis import tables


@pytest.mark.parametrize("sizes", [(3100, 3600), (9000, 9000), (2e6, 5e6), (3000, 40_000)])
def test_an_axis_of_bytes_has_ticks_however_short_it_is(sizes):
    row = {"student": "S", "ipc": 5, "method": "soft", "seed": 0, "last_top1": 50.0}
    rows = [{**row, "slc": 5 + size, "label_bytes": size} for size in sizes]
    axis = tables.plot(rows, "label_bytes").axes[0]
    low, high = axis.get_xlim()
    texts = [axis.xaxis.major.formatter(x) for x in axis.get_xticks() if low <= x <= high]
    assert len(texts) >= 2 and len({*texts}) == len(texts)
    assert all(text.endswith(("kB", "MB")) and len(text) <= 6 for text in texts)


def test_a_table_in_the_layout_of_a_paper():
    """Labels that do not depend on the SLC give the same value in every row of their IPC."""
    row = {"ipc": 2, "student": "S", "codec": ""}
    rows = [
        {**row, "method": method, "slc": slc, "seed": seed, "last_top1": top1 + seed}
        for method, slc, top1 in (("hard", None, 10.0), ("soft", 2, 20.0), ("soft", 6, 30.0))
        for seed in (0, 1)
    ]
    lines = tables.in_layout(rows, rows=["ipc", "labels_per_image"], columns=["student", "method"])
    assert lines == [
        {"IPC": 2, "labels per image": 1, "S hard": "10.5 ± 0.7", "S soft": "20.5 ± 0.7"},
        {"IPC": 2, "labels per image": 3, "S hard": "10.5 ± 0.7", "S soft": "30.5 ± 0.7"},
    ]


def test_a_table_never_averages_over_what_it_does_not_name():
    row = {"student": "S", "method": "soft", "slc": 4, "seed": 0, "last_top1": 1.0}
    rows = [{**row, "ipc": ipc, "codec": codec} for ipc in (2, 4) for codec in ("a", "b")]
    lines = tables.in_layout(rows, rows=["ipc"], columns=["method"])
    assert [list(line.values()) for line in lines] == [
        [ipc, codec, count, "1.0"] for ipc, count in ((2, 2), (4, 1)) for codec in ("a", "b")
    ]


def test_a_table_in_latex():
    rows = [{"method": "a_b & c", "top-1 (%)": "10.5 ± 0.7", "SLC": "–"}]
    rows += [{"method": "hald", "top-1 (%)": "9.0", "SLC": 5}]
    assert tables.latex_table(rows, seeds="1 to 2").splitlines() == [
        r"% in the preamble: \usepackage{booktabs}",
        "% top-1: mean and sample standard deviation over n = 1 to 2 seeds",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"Method & top-1 (\%) & SLC \\",
        r"\midrule",
        r"a\_b \& c & 10.5 $\pm$ 0.7 & -- \\",
        r"HALD & 9.0 & 5 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_names_of_any_letters_are_escaped_in_latex():
    table = tables.latex_table([{"codec": r"T^2 \{~#$%|<>}²"}], seeds="1")
    escaped = r"T\textasciicircum{}2 \textbackslash{}\{\textasciitilde{}\#\$\%$|$$<$$>$\}$^2$ \\"
    assert table.splitlines()[-3] == escaped


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hard", "Hard"),
        ("hald", "HALD"),
        ("ResNet18 hald klt", "ResNet18 HALD KLT"),
        ("best top-1 (%)", "Best top-1 (%)"),
        ("klt_01", "klt_01"),
        ("fp16", "fp16"),
        ("–", "–"),
    ],
)
def test_names_in_print_have_capitals(name, expected):
    assert tables.printed(name) == expected


@pytest.mark.parametrize("amounts", [range(50, 501, 50), [5], [1, 1000], [150, 151]])
def test_labels_of_the_axis_of_labels_per_class_do_not_overlap(amounts):
    row = {"student": "S", "ipc": 1, "method": "soft", "seed": 0, "last_top1": 50.0}
    figure = tables.plot([{**row, "slc": slc, "label_bytes": slc} for slc in amounts], "slc")
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    assert int(labels[0].get_text()) == max(amounts)
    places = sorted((each.get_window_extent().x0, each.get_window_extent().x1) for each in labels)
    ends = [end for _, end in places]
    assert all(start > end for (start, _), end in zip(places[1:], ends, strict=False))

"""The measured study: study.md's tables and plots from the CSVs in analysis/results.

python analysis/study.py                    tables and plots again, from the committed CSVs
python analysis/study.py --collect PLAN …   first takes over the results of finished sweeps

A table stands in study.md between `<!-- KIND NAME -->` and `<!-- end -->`, KIND one of `results`
(the sweep's table of NAME.csv), `choice` (how settings of one method compare on held-out
training images), `pivot` (methods named "ROW / COLUMN": a cell for each), `labels` (a line for each
student and number of labels per image; with auto against the best of the four that it replaces,
paired by seed) and `sets` (a line for each method, a column for each number of labels per image in
NAME_digits.csv, NAME_fashion.csv, NAME_photos.csv and NAME_glyphs.csv, those that there are).
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import math
import re
import statistics

from analysis import sweep, tables
from utils import cli
from utils.cli import UserError
from utils.files import atomic_write, save_figure
from utils.results import provenance, write_csv

HERE = Path(__file__).resolve().parent
RESULTS, PLANS, STUDY = HERE / "results", HERE / "plans", HERE / "study.md"
SETS = {"digits": "digits", "fashion": "Fashion", "photos": "photos", "glyphs": "characters"}
RIVALS = {"hard", "soft", "published", "balanced"}  # of auto


def collect(plan: str) -> None:
    """Writes results/PLAN.csv from the runs of plans/PLAN.yaml; raises UserError if some lack."""
    path = PLANS / f"{plan}.yaml"
    if not path.exists():
        raise UserError(f"no plan at {path}")
    tasks = sweep.run_tasks(sweep.read_settings(["--plan", str(path)]))
    rows = sweep.collect(tasks)
    if len(rows) < len(tasks):
        raise UserError(f"{plan}: {len(tasks) - len(rows)} of {len(tasks)} runs are not finished")
    about = provenance(f"bash scripts/run_sweep.sh --plan analysis/plans/{plan}.yaml")
    write_csv(rows, RESULTS / f"{plan}.csv", about)


def read(name: str) -> list[dict]:
    """The rows of results/NAME.csv."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise UserError(f"{path} is missing: run the sweep, then --collect {name}")
    return tables.read_csv(path)


def scores(rows: list[dict]) -> dict[str, dict[int | None, float]]:
    """Last top-1 (%), the mean over seeds, by method and SLC."""
    means: dict[str, dict[int | None, float]] = {}
    for (method, slc), group in tables.grouped(rows, "method", "slc").items():
        means.setdefault(method, {})[slc] = statistics.mean(tables.column(group, "last_top1"))
    return means


def choices(rows: list[dict]) -> dict[str, str]:
    """For each method the settings with the highest mean over SLC.

    The first word of a row's method is the method, the rest its settings.
    """
    best: dict[str, tuple[float, str]] = {}
    for name, by_slc in scores(rows).items():
        method, _, setting = name.partition(" ")
        score = statistics.mean(by_slc.values())
        best[method] = max(best.get(method, (-1.0, "")), (score, setting))
    return {method: setting for method, (_, setting) in best.items()}


def results_table(rows: list[dict]) -> str:
    """The table of a sweep."""
    return tables.markdown_table(tables.lines(rows), tables.LEFT)


def choice_table(rows: list[dict]) -> str:
    """Every setting's top-1 per SLC and on average; the chosen ones in bold."""
    chosen = choices(rows)
    amounts = sorted({row["slc"] for row in rows if row["slc"]})
    lines = []
    for name, by_slc in scores(rows).items():
        method, _, setting = name.partition(" ")
        bold = "**" if chosen[method] == setting else ""
        line = {"method": method, "setting": f"{bold}{setting}{bold}"}
        for slc in amounts:
            line[f"SLC {slc}"] = f"{by_slc.get(slc, by_slc.get(None)):.1f}"
        line["mean"] = f"{bold}{statistics.mean(by_slc.values()):.1f}{bold}"
        lines.append(line)
    return tables.markdown_table(lines, left=("method", "setting"))


def pivot_table(rows: list[dict]) -> str:
    """Last top-1, mean ± standard deviation over seeds, of methods "ROW / COLUMN"."""
    corner = "last top-1 (%)"
    groups = tables.grouped(rows, "method")
    headings = dict.fromkeys(method.partition(" / ")[2] for (method,) in groups)
    lines: dict[str, dict[str, str]] = {}
    for (method,), group in groups.items():
        name, _, heading = method.partition(" / ")
        line = lines.setdefault(name, {corner: name, **dict.fromkeys(headings, "–")})
        line[heading] = tables.mean_std(tables.column(group, "last_top1"))
    return tables.markdown_table(list(lines.values()), left=(corner,))


def labels_table(rows: list[dict]) -> str:
    """Last top-1 of every method by labels per image, and by how much auto exceeds the best rival.

    With the difference stands its standard error, from the differences of equal seeds.
    """
    lines = []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    students = list(dict.fromkeys(row["student"] for row in rows))
    for student in students:
        of_student = [row for row in rows if row["student"] == student]
        for slc in dict.fromkeys(row["slc"] for row in of_student if row["slc"]):
            compared = [row for row in of_student if row["slc"] in (slc, None)]
            compared.sort(key=lambda row: (methods.index(row["method"]), row["seed"]))
            line = {"student": student} if len(students) > 1 else {}
            lines.append(
                line | {"labels per image": slc // compared[0]["ipc"]} | _compared(compared)
            )
    return tables.markdown_table(lines, left=("student",))


def _compared(rows: list[dict]) -> dict[str, str]:
    """The cells of a line of `labels_table`, from rows in order of methods and seeds."""
    top1 = {
        method: tables.column(group, "last_top1")
        for (method,), group in tables.grouped(rows, "method").items()
    }
    rivals = [method for method in top1 if method in RIVALS]
    best = max(rivals, key=lambda method: statistics.mean(top1[method]))
    differences = [one - other for one, other in zip(top1["auto"], top1[best], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    cells = {method: tables.mean_std(values) for method, values in top1.items()}
    return cells | {"auto - best": f"{statistics.mean(differences):+.1f} ± {error:.1f} ({best})"}


def sets_table(name: str) -> str:
    """Last top-1 of every method on every data set, mean ± standard deviation over seeds."""
    corner, lines, headings = "last top-1 (%)", {}, []
    for data, shown in SETS.items():
        if not (RESULTS / f"{name}_{data}.csv").exists():
            continue
        rows = read(f"{name}_{data}")
        for slc in dict.fromkeys(row["slc"] for row in rows if row["slc"]):
            headings.append(heading := f"{shown}, {slc // rows[0]['ipc']}")
            compared = [row for row in rows if row["slc"] in (slc, None)]
            for (method,), group in tables.grouped(compared, "method").items():
                line = lines.setdefault(method, {corner: method})
                line[heading] = tables.mean_std(tables.column(group, "last_top1"))
    whole = [{name: line.get(name, "–") for name in [corner, *headings]} for line in lines.values()]
    return tables.markdown_table(whole, left=(corner,))


def fill(text: str) -> str:
    """study.md with every table made again; raises UserError for an unknown kind of table."""
    of_one_file = {
        "results": results_table,
        "choice": choice_table,
        "pivot": pivot_table,
        "labels": labels_table,
    }

    def table(marker: re.Match) -> str:
        kind, name = marker[1], marker[2]
        if kind not in (*of_one_file, "sets"):
            raise UserError(
                f"{STUDY}: unknown table {kind!r} (known: {', '.join(of_one_file)}, sets)"
            )
        made = sets_table(name) if kind == "sets" else of_one_file[kind](read(name))
        return f"<!-- {kind} {name} -->\n{made}<!-- end -->"

    return re.sub(r"<!-- (\w+) (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    parser = cli.Parser(description="Tables and plots of study.md from the CSVs.")
    parser.add_argument(
        "--collect", nargs="+", default=[], metavar="PLAN", help="finished sweeps of analysis/plans"
    )
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for plan in args.collect:
        collect(plan)
    text = fill(STUDY.read_text())
    axes = {"slc": "slc", "bytes": "label_bytes"}
    for name, against in re.findall(r"\(results/(\w+)_(slc|bytes)\.png\)", text):
        figure = tables.plot(read(name), axes[against])
        save_figure(figure, RESULTS / f"{name}_{against}.png")
    atomic_write(STUDY, text.encode())
    print(f"{STUDY} and the plots in {RESULTS} are made again")


if __name__ == "__main__":
    cli.run(main)

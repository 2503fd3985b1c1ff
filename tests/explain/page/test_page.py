"""A page holds what it was given, shows it where it lies, and runs nothing but its own scripts."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose

import segkit.explain.page.page as page_module
from segkit.explain.display import Bar, Bars, Curve, Line, Table, Verdict
from segkit.explain.page.page import SCRIPTS, VIEWER, Layer, Page, page_text, write_page
from segkit.geometry.grid import Grid
from segkit.io.picture_rules import PictureFacts
from segkit.io.volume import Volume
from tests.browser import CHROMIUM, Shown, show
from tests.explain.page.test_embed import grid_of
from tests.helpers import affine_of

HOSTILE = "</script><script>document.title='caught'</script><img src=x onerror=alert(1)>"
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install chromium")


def element(text: str, name: str) -> str:
    found = re.search(rf'<script [^>]*id="{name}">([^<]*)</script>', text)
    assert found
    return found[1]


def small_page(name: str = "gate") -> Page:
    scan = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    grid = grid_of(scan)
    return Page(
        f"Of {name}",
        Volume(scan, grid),
        [
            Layer(name, "map", np.linspace(0, 1, 60).reshape(scan.shape), grid, quantity=name),
            Layer(name, "labels", (scan > 30).astype(np.uint8), grid, label_names={1: name}),
        ],
        tables=[Table(name, [name, "Dice"], [[name, 0.5], [name, np.nan]], note=name)],
        curves=[Curve(name, name, name, [Line(name, [0, 1], np.array([1.0, np.inf]))], note=name)],
        bars=[Bars(name, name, [Bar(name, np.float32(0.25), chance=0.5)], note=name)],
        verdicts=[Verdict(name, "redundant", name, {name: np.int64(3)})],
        facts={name: name},
    )


class Elements(HTMLParser):
    """The tags of a page, and all text outside scripts and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.words += data


def test_a_name_cannot_become_markup() -> None:
    tame, hostile = Elements(page_text(small_page())), Elements(page_text(small_page(HOSTILE)))
    assert hostile.tags == tame.tags
    assert f"Of {HOSTILE}" in hostile.words
    content = json.loads(element(page_text(small_page(HOSTILE)), "content"))
    assert content["layers"][0]["name"] == content["tables"][0]["rows"][0][0] == HOSTILE


def test_a_name_is_not_taken_for_a_part_of_the_page() -> None:
    assert "Of {{content}}" in Elements(page_text(small_page("{{content}}"))).words


def test_figures_are_plain_json_and_nan_is_null() -> None:
    content = json.loads(element(page_text(small_page()), "content"))
    assert content["tables"][0]["rows"] == [["gate", 0.5], ["gate", None]]
    assert content["curves"][0]["lines"][0]["y"] == [1, None]
    assert content["verdicts"][0]["numbers"] == {"gate": 3}
    assert content["bars"][0]["bars"][0]["value"] == 0.25


def test_a_page_lets_its_own_scripts_run_and_nothing_be_fetched() -> None:
    text = page_text(small_page())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    assert policy[1].count("'sha256-") == len(SCRIPTS) + 1
    for name in SCRIPTS:
        script = (VIEWER / name).read_text()
        assert f"<script>{script}</script>" in text
        assert "</script" not in script and "<!--" not in script
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_a_page_of_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    write_page(tmp_path / "a.html", small_page())
    write_page(tmp_path / "b.html", small_page())
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_legends_show_millilitres_and_name_labels_without_a_name() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[:5] = 2
    grid = Grid((10, 10, 10), np.diag([-2.0, 1.0, 3.0, 1.0]))
    layer = Layer("reference", "labels", labels, grid, label_names={0: "background", 1: "anterior"})
    content = json.loads(element(page_text(Page("t", Volume(labels, grid), [layer])), "content"))
    told = [(each["name"], each["amount"]) for each in content["layers"][0]["labels"]]
    assert told == [("anterior", 0), ("label 2", pytest.approx(3.0))]


def test_a_map_has_its_range_of_values_and_its_possible_range() -> None:
    values = np.linspace(0.4, 0.6, 101).reshape(101, 1, 1)
    values[0] = np.nan
    grid = grid_of(values)
    layer = Layer("gate", "map", values, grid, low=0.0, high=1.0)
    nothing = Layer("none", "map", np.full_like(values, np.nan), grid)
    page = Page("t", Volume(np.zeros(grid.shape), grid), [layer, nothing])
    told, empty = json.loads(element(page_text(page), "content"))["layers"]
    assert (told["low"], told["high"]) == (0, 1)
    assert_allclose(told["spans"], np.percentile(values[1:], [1, 99]))
    assert empty["spans"] == [empty["low"], empty["high"]] == [0, 0]


def test_a_layer_must_fit_its_grid() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\), found \(1, 1, 1\)"):
        Layer("gate", "map", np.zeros((1, 1, 1)), Grid((2, 2, 2), np.eye(4)))


@pytest.mark.slow
def test_a_brain_of_one_millimetre_with_three_maps_stays_below_30_mb() -> None:
    noise = np.random.default_rng(0)
    shape = (197, 233, 189)
    grid = Grid(shape, np.eye(4))
    scan = noise.normal(1000, 100, shape).astype(np.float32)  # nothing packs worse
    labels = np.zeros(shape, np.uint8)
    labels[40:160, 40:190, 40:150] = noise.integers(0, 4, (120, 15, 110)).repeat(10, axis=1)
    layers = [Layer("segmentation", "labels", labels, grid)]
    for stride in (2, 4, 8):
        cells = tuple(size // stride for size in shape)
        coarse = grid.placed(cells, [stride] * 3, [(stride - 1) / 2] * 3)
        layers.append(Layer(f"gate {stride}", "map", noise.random(cells), coarse))
    assert len(page_text(Page("brain", Volume(scan, grid), layers))) < 30e6


# In a browser. Scan and map are fields of world coordinates, so that a value tells its place.

CROSS_HAIR = (12, 7, 5)
"""A voxel of the scan below, in the file's own axes."""


def fields() -> tuple[Page, ndarray]:
    """An oblique LSA scan whose value is x, a coarse map of another orientation whose value is
    x + 2y - 3z, and labels by the sign of the middle axis; and the cross-hair's world coordinates.
    """
    grid = Grid((24, 14, 11), affine_of("LSA"))
    x, _, _ = np.moveaxis(grid.centres(), -1, 0)
    centre = grid.world(np.array([11.5, 6.5, 5.0]))
    coarse = Grid((9, 8, 10), affine_of("PIR", spacing=(7.0, 6.0, 6.0), rotation=(0.1, 0.2, -0.1)))
    shift = centre - coarse.world(np.array([4.0, 3.5, 4.5]))
    moved = coarse.affine.copy()
    moved[:3, 3] += shift
    coarse = Grid(coarse.shape, moved)
    labels = np.zeros(grid.shape, np.uint8)
    labels[:, :6], labels[:, 6:] = 1, 2
    page = Page(
        "Fields",
        Volume(x, grid),
        [
            Layer("skip.1/gate", "map", coarse.centres() @ [1.0, 2.0, -3.0], coarse),
            Layer("segmentation", "labels", labels, grid, label_names={2: HOSTILE}),
            Layer("reference", "labels", labels, grid),
        ],
        verdicts=[Verdict("skip.1/gate", "informative", "It says where it lies.")],
        bars=small_page().bars,
        curves=small_page().curves,
        tables=small_page().tables,
    )
    return page, grid.world(np.array(CROSS_HAIR, dtype=float))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shown, Shown, ndarray]:
    """That page with all its overlays and with one switched off, and the cross-hair."""
    folder = tmp_path_factory.mktemp("page")
    page, world = fields()
    write_page(folder / "page.html", page)
    at = ("at", ",".join(f"{mm:.3f}" for mm in world))
    names = [("overlay", layer.name) for layer in page.layers]
    whole = show(folder / "page.html", folder / "whole", [at, *names])
    without = show(folder / "page.html", folder / "without", [at, *names, ("off", names[0][1])])
    return whole, without, world


@in_a_browser
def test_a_page_opens_without_errors_and_shows_its_overlays(
    opened: tuple[Shown, Shown, ndarray],
) -> None:
    whole, without, _ = opened
    for shown in opened[:2]:
        assert 'data-ready="yes"' in shown.dom and shown.console == []
    assert whole.view["overlay"] == ["skip.1/gate", "segmentation", "reference"]
    assert without.view["overlay"] == ["segmentation", "reference"]
    assert without.view["off"] == ["skip.1/gate"]
    assert len(np.unique(whole.pixels.reshape(-1, 3), axis=0)) > 500
    assert np.abs(whole.pixels - without.pixels).mean() > 1
    assert whole.dom.count(">Colours from ") == 1  # of the map's own range instead
    # The card of a verdict has the map, the word and the sentence.
    card = whole.dom[whole.dom.index('<span class="verdict informative">') :]
    assert card.index(">informative</span>") < card.index("<p>It says where it lies.</p>")


@in_a_browser
def test_values_under_the_cross_hair_are_those_of_its_place(
    opened: tuple[Shown, Shown, ndarray],
) -> None:
    whole, _, world = opened
    assert whole.text("voxel") == ", ".join(map(str, CROSS_HAIR))
    assert whole.value(0) == pytest.approx(world[0], abs=0.001)
    assert whole.value(1) == pytest.approx(world @ [1.0, 2.0, -3.0], abs=0.01)
    assert whole.value(2) == whole.value(3) == 2
    assert whole.text("value-2") == HOSTILE and whole.text("value-3") == "label 2"


@in_a_browser
@pytest.mark.parametrize("orientation", ["radiological", "neurological"])
def test_the_patients_right_and_front_are_where_letters_say(
    tmp_path: Path, orientation: str
) -> None:
    # One slice, stored as no viewer shows it; its right front quarter is bright.
    grid = Grid((1, 30, 20), affine_of("ILP", rotation=(0.0, 0.0, 0.0)))
    world = grid.centres()
    middle = world.reshape(-1, 3).mean(axis=0)
    bright = (world[..., 0] > middle[0]) & (world[..., 1] > middle[1])
    write_page(tmp_path / "page.html", Page("Slice", Volume(np.where(bright, 9, -9), grid)))
    view = [("orientation", orientation), ("theme", "dark")]
    shown = show(tmp_path / "page.html", tmp_path / "run", view)
    assert shown.console == []
    # The window's black and white, which nothing near the canvas is.
    plane = shown.pixels[60:, :850]
    white = np.argwhere((plane == 255).all(axis=-1))
    black = np.argwhere((plane == 0).all(axis=-1))
    assert len(white) > 10_000 and len(black) > 2 * len(white)
    (up, left), (white_up, white_left) = black.mean(axis=0), white.mean(axis=0)
    right_is_left = orientation == "radiological"
    assert white_up < up - 50 and (white_left < left - 50) == right_is_left
    assert abs(white_left - left) > 50
    letters = "".join(shown.text(f"edge {edge}") for edge in ("left", "right", "top", "bottom"))
    assert letters == ("RLAP" if right_is_left else "LRAP")


@in_a_browser
def test_a_micrograph_has_square_cells_and_long_names_keep_the_mark_of_low_values(
    tmp_path: Path,
) -> None:
    grid = Grid((8, 8, 1), np.diag([0.0005, 0.0005, 1.0, 1.0]))
    values = np.arange(64.0).reshape(grid.shape)
    page = Page(
        "Micrograph",
        Volume(values.astype(np.float32), grid, picture=PictureFacts("µm", "a test")),
        [Layer("gate", "map", values / 64, grid)],
        bars=[Bars("AUROC", "AUROC", [Bar("intensity of channel 12 ↓", 0.25, baseline=True)])],
    )
    write_page(tmp_path / "page.html", page)
    shown = show(tmp_path / "page.html", tmp_path / "run")
    assert shown.console == [] and "Cells of 0.5 × 0.5 µm," in shown.dom
    assert "intensity… channel 12 ↓<" in shown.dom
    # A micrograph has no patient.
    assert re.search(r'id="convention"[^>]*hidden[^>]*></button>', shown.dom)
    assert [shown.text(f"edge {edge}") for edge in ("left", "right", "top", "bottom")] == [""] * 4


@in_a_browser
def test_an_injected_script_does_not_run(tmp_path: Path) -> None:
    slipped = "<script>document.title='caught'</script></body>"
    (tmp_path / "page.html").write_text(page_text(small_page()).replace("</body>", slipped))
    shown = show(tmp_path / "page.html", tmp_path / "run")
    assert 'data-ready="yes"' in shown.dom and "<title>Of gate</title>" in shown.dom
    assert len(shown.console) == 1 and "Content Security Policy" in shown.console[0]


# Without a screen there are no frames to wait for, so drawing is asked of the clock instead.
HANDS = """
window.requestAnimationFrame = (draw) => setTimeout(draw, 0);
(async () => {
  const drawn = () => new Promise((done) => setTimeout(done, 20));
  while (page.dataset.ready !== "yes") await drawn();
  const seen = [];
  const act = async (target, event) => {
    target.dispatchEvent(event);
    await drawn();
    seen.push(byId("voxel").textContent);
  };
  const press = (key, more) => new KeyboardEvent("keydown", { key, bubbles: true, ...more });
  const axial = byId("axial");
  await act(axial, press("ArrowRight"));
  await act(axial, press("ArrowUp"));
  await act(axial, press("PageUp"));
  await act(axial, press("ArrowLeft", { shiftKey: true }));
  await act(axial, new WheelEvent("wheel", { deltaY: 100, cancelable: true }));
  const box = axial.getBoundingClientRect();
  const place = { clientX: box.left + 2, clientY: box.bottom - 2, button: 0 };
  await act(axial, new PointerEvent("pointerdown", place));
  byId("convention").click();
  await act(axial, press("ArrowRight"));
  await act(axial, press("2"));
  const [x, y, z] = document.querySelectorAll(".world input");
  x.value = 4; y.value = 5; z.value = 1000;
  await act(z, new Event("change"));
  document.querySelector("#tables thead .number button").click();
  const order = [...document.querySelectorAll("#tables tbody th")].map((cell) => cell.textContent);
  document.querySelector("#verdicts button").click();
  await drawn();
  const boxes = [...document.querySelectorAll(".scrolled")];
  const clipped = boxes.filter((box) => box.scrollWidth > box.clientWidth).length;
  byId("spoken").textContent = JSON.stringify({ seen, order, clipped });
})();
"""


@in_a_browser
def test_keys_wheel_and_mouse_move_the_cross_hair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(str(VIEWER), tmp_path / "viewer")
    (tmp_path / "viewer" / "hands.js").write_text(HANDS)
    monkeypatch.setattr(page_module, "VIEWER", tmp_path / "viewer")
    monkeypatch.setattr(page_module, "SCRIPTS", (*SCRIPTS, "hands.js"))
    grid = Grid((20, 30, 40), np.eye(4))
    scan = grid.centres()[..., 0]
    page = Page(
        "Hands",
        Volume(scan, grid),
        [Layer(name, "map", scan, grid) for name in ("first", "second")],
        tables=[
            Table("Dice", ["case", "Dice"], [["a", 0.9], ["b", None], ["c", 0.1]]),
            Table("Wide", ["map", *["disagreement"] * 9], [["skip.1/gate", *[0.1234] * 9]]),
        ],
        verdicts=[Verdict("second", "informative", "It is.")],
    )
    write_page(tmp_path / "page.html", page)
    shown = show(tmp_path / "page.html", tmp_path / "run", [("at", "10,15,20")])
    told = json.loads(shown.text("spoken"))
    assert told["seen"] == [
        "9, 15, 20",  # towards the patient's left, which is on the right
        "9, 16, 20",
        "9, 16, 21",
        "19, 16, 21",
        "19, 16, 20",
        "19, 0, 20",  # the lower left corner
        "19, 0, 20",  # no further to the right
        "19, 0, 20",
        "4, 5, 39",  # nor beyond the head
    ]
    assert told["order"][:3] == ["b", "c", "a"]
    assert told["clipped"] == 0
    assert shown.view["overlay"] == ["second"] and shown.view["off"] == ["first"]
    assert shown.view["orientation"] == ["neurological"]

"""Models in zips, here and on web servers: fetched once, checked, and unpacked with care."""

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from segkit.errors import ModelError
from segkit.io.folder_cache import user_cache
from segkit.model.fetch_model import check_sums, fetch_model
from segkit.model.folder import load_model, model_folders, save_model
from tests.hub import file_server
from tests.models import model_of


def zip_of(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as zipped:
        for name, data in files.items():
            zipped.writestr(name, data)
    return content.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model folder."""
    folder = tmp_path_factory.mktemp("files")
    save_model(folder, model_of({"skip": "additive_grid"}, 3))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def below(prefix: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{prefix}/{name}": content for name, content in files.items()}


@pytest.mark.parametrize("prefix", ["", "run/", "model/", "run/model/"])
def test_a_zip_is_the_model_or_run_in_it(
    tmp_path: Path, files: dict[str, bytes], prefix: str
) -> None:
    content = zip_of({f"{prefix}{name}": data for name, data in files.items()})
    (tmp_path / "my model.zip").write_bytes(content)
    (here,) = model_folders(tmp_path / "my model.zip")
    with file_server({"/m": content}) as (url, asked):
        (there,) = model_folders(f"{url}/m?download=1")
        assert model_folders(f"{url}/m?download=1") == (there,)
    assert asked == ["/m?download=1"], "it is fetched once"
    assert model_folders(f"{url}/m?download=1") == (there,), "without the server too"
    for folder in (here, there):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_zip_of_folds_is_all_folds(tmp_path: Path, files: dict[str, bytes]) -> None:
    content = zip_of(below("cv/fold_0/model", files) | below("cv/fold_1/model", files))
    (tmp_path / "a.zip").write_bytes(content)
    found = model_folders(tmp_path / "a.zip")
    assert [folder.parent.name for folder in found] == ["fold_0", "fold_1"]


def test_a_checksum_in_the_address_is_that_of_the_zip(files: dict[str, bytes]) -> None:
    content = zip_of(files)
    right = hashlib.sha256(content).hexdigest()
    wrong = "0" * 64
    with file_server({"/m.zip": content}) as (url, asked):
        with pytest.raises(ModelError, match=f"expected the SHA-256 {wrong}, found {right}"):
            load_model(f"{url}/m.zip#sha256={wrong}")
        model = load_model(f"{url}/m.zip#sha256={right}")
        assert load_model(f"{url}/m.zip#sha256={right}").description == model.description
    assert asked == ["/m.zip", "/m.zip"]


def test_a_zip_is_fetched_again_only_if_that_is_asked_for(files: dict[str, bytes]) -> None:
    served = {"/m.zip": zip_of(files)}
    with file_server(served) as (url, _):
        fetch_model(f"{url}/m.zip")
        served["/m.zip"] = zip_of(below("renamed", files))
        assert fetch_model(f"{url}/m.zip").name == "unpacked"
        assert fetch_model(f"{url}/m.zip", refresh=True).name == "renamed"
        del served["/m.zip"]
        with pytest.raises(ModelError, match="the server answered 404"):
            fetch_model(f"{url}/m.zip", refresh=True)
    assert fetch_model(f"{url}/m.zip").name == "renamed", "what is cached stays"


def test_zips_that_are_no_models_are_refused_and_nothing_is_kept(files: dict[str, bytes]) -> None:
    two = below("a", files) | below("b", files)
    outside = files | {"../outside.txt": b"x"}
    served = {
        "/empty.zip": zip_of({"a.txt": b"x"}),
        "/two.zip": zip_of(two),
        "/outside.zip": zip_of(outside),
        "/absolute.zip": zip_of(files | {"/tmp/x": b"x"}),
        "/page": b"<!doctype html><p>Log in",
        "/weights.pt": b"\x80\x02}q\x00.",
        "/damaged.zip": zip_of(files)[:-30],
    }
    with file_server(served) as (url, _):
        for path, sentence in {
            "/empty.zip": r"expected one run or model folder with model\.json in it, found none",
            "/two.zip": "found 2; pack exactly one model",
            "/outside.zip": "found '../outside.txt', which would lie outside the folder",
            "/absolute.zip": "found '/tmp/x', which would lie outside the folder",
            "/page": "expected a zip with a model, found a web page",
            "/weights.pt": "found no archive",
            "/damaged.zip": "found no archive",
            "/missing.zip": "cannot be fetched: the server answered 404",
            "/empty.zip?cut": "cannot be fetched: expected [0-9]+ bytes, found",
            "/x?to=file:///etc/passwd": "Redirection to url 'file:///etc/passwd' is not allowed",
            "/x?to=ftp://a.org/m.zip": "it leads on to ftp://a.org/m.zip, which is not encrypted",
        }.items():
            with pytest.raises(ModelError, match=sentence) as raised:
                load_model(f"{url}{path}")
            assert str(raised.value).startswith(url) and "\n" not in str(raised.value)
    with pytest.raises(ModelError, match=r"cannot be fetched: .*refused; check the address"):
        load_model("http://127.0.0.1:9/m.zip")
    assert not [path for path in user_cache().rglob("*") if path.is_file()]


def test_a_folder_with_a_list_of_checksums_is_compared_with_it(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in files.items()]
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("\n".join(lines) + "\n")
    load_model(tmp_path)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(files[weights.name][:-1] + b"\1")
    with pytest.raises(ModelError, match=r"weights\.safetensors: expected the SHA-256 .* found"):
        load_model(tmp_path)
    for text, sentence in {
        f"{'0' * 64}  gone.txt\n": "found no such file",
        f"{'0' * 64}  ../../etc/passwd\n": "found no such file",
        "nonsense\n": "cannot be read: not enough values",
    }.items():
        sums.write_text(text)
        with pytest.raises(ModelError, match=sentence):
            check_sums(tmp_path)

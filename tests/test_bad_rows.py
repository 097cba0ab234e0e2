"""Claims about rows that would end a program or be lost: each is one bad row with its line, and those after it are read."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from alula.data import Sample, read_samples
from alula.data.formats import read_lines
from alula.data.readers import sample_of
from alula.data.sample import BadRow
from alula.errors import UserError
from data_files import chat, contents, png, put_pictures, qa, written
from test_formats import as_json, tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put_pictures(tmp_path)


BASE64 = base64.b64encode(png()).decode()
BAD_LINES: dict[str, tuple[Any, str]] = {
    "base64 as a path": (qa(image=BASE64 * 10), "no image file .*If it is base64, write data:image/png;base64, in front"),
    "base64 as bytes": (qa(image={"bytes": BASE64, "path": None}), "no image file .*If it is base64"),
    "a name that no file can have": (qa(image="a" * 300 + ".png"), "no image file .*Correct the path"),
    "half a character": (qa(question="what \ud83d?"), "not valid JSON .*surrogates not allowed"),
    "a role that is a list": (chat((["user"], "a"), ("assistant", "b")), r"role \['user'\]. Known"),
    "a role that is an object": (chat(({"a": 1}, "a"), ("assistant", "b")), "role {'a': 1}. Known"),
    "a data address that is no ASCII": (qa(image="data:image/png;base64,é"), "not valid base64"),
    "a number of 5000 digits": ('{"question": "a", "answer": %s}' % ("1" * 5000), "not valid JSON .*4300 digits"),
    "a deep value": ('{"question": "a", "answer": %s}' % ("[" * 99999 + "]" * 99999), "not valid JSON .*nested too deeply"),
    "an image without anything": (qa(image={"bytes": None, "path": None}), "an image is dict {'bytes': None, 'path': None}. A path"),
    "a web address in capitals": (qa(image="HTTPS://x.org/a.png"), "is a web address. Download"),
    "an address of a bucket": (qa(image="s3://bucket/a.png"), "is a web address. Download .*nothing is fetched"),
    "rows in a row": ({"version": 1, "data": [qa()]}, "If the rows are in 'data', write that list alone"),
    "a list of rows": ([qa()], "a list came, an object with keys is wanted"),
}


def found(path: Path) -> list[Sample | str]:
    """Every row as the doctor reads it: a sample, or what is wrong."""
    read: list[Sample | str] = []
    for line in read_lines(path):
        try:
            read.append(sample_of(line, [path.parent]))
        except BadRow as error:
            read.append(str(error))
    return read


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_one_bad_row_and_those_after_it_are_read(case: str, folder: Path) -> None:
    row, says = BAD_LINES[case]
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in (qa(), row, qa())))
    with pytest.raises(UserError, match=rf"(?s)^[^ ]*data\.jsonl:2: .*{says}") as refused:
        read_samples(path)
    assert len(str(refused.value)) < 700
    assert [isinstance(row, Sample) for row in found(path)] == [True, False, True]


def test_a_row_alone_is_named_like_one_of_many(folder: Path) -> None:
    for row, says in BAD_LINES.values():
        (folder / "data.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
        if not isinstance(row, list):  # a list alone is a list of rows
            with pytest.raises(UserError, match=rf"(?s)data\.jsonl:1: .*{says}"):
                read_samples(folder / "data.jsonl")


ONE = json.dumps(qa())


@pytest.mark.parametrize(
    ("text", "line"),
    [(f"[{ONE}]\n[{ONE}]\n", 2), (f"[\n{ONE}\n]\n\n{ONE}", 5), (f"[{ONE}] rest", 1), (f"[]\n{ONE}", 2), (f'[{ONE},\n"\\ud83d"]', 2)],
)
def test_what_follows_a_list_is_not_dropped(text: str, line: int, folder: Path) -> None:
    for name in ("data.json", "data.jsonl"):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}:{line}: (more follows after the end of the list. Put all rows|not valid JSON)"):
            read_samples(folder / name)
        assert isinstance(found(folder / name)[-1], str)


def test_one_object_may_take_several_lines_and_both_halves_of_a_character_are_one(folder: Path) -> None:
    (folder / "data.json").write_text("\n" + json.dumps(qa(question="\U0001f600"), indent=1))
    (sample,) = read_samples(folder / "data.json")
    assert (sample.question, sample.origin) == ("\U0001f600", "data.json:2")
    (folder / "data.json").write_text(json.dumps({"data": [qa()]}, indent=1))
    with pytest.raises(UserError, match="If the rows are in 'data', write that list alone"):
        read_samples(folder / "data.json")


def test_an_image_may_be_any_address_of_a_file(folder: Path) -> None:
    (folder / "a b.png").write_bytes(png())
    files = [f"{start}{folder}/a%20b.png" for start in ("file:", "file://", "file://localhost", "FILE://")]
    texts = [f"data:image/png;base64,{BASE64[:20]}\n{BASE64[20:]}", f"DATA:image/png;BASE64,{BASE64}"]
    samples = read_samples(written(folder, *(qa(image=image) for image in files + texts)))
    assert [sample.images for sample in samples] == [(folder / "a b.png",)] * 4 + [(png(),)] * 2


def test_a_developer_speaks_as_the_system(folder: Path) -> None:
    (sample,) = read_samples(written(folder, chat(("developer", "be short"), ("user", "a"), ("assistant", "b"))))
    assert contents(sample)[0] == ("system", "be short")


BAD_MEMBERS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "images that are a number": ([("1.json", as_json(qa(images=5)))], "an image is int 5"),
    "a caption whose image is missing": ([("1.txt", b"a red square")], "the caption '1' has no image. Add the image"),
    "a deep member": ([("1.json", b"[" * 99999)], "the text of '1' is not valid .*nested too deeply"),
    "half a character": ([("1.json", as_json(qa(question="\ud83d")))], "the text of '1' is not valid .*surrogates"),
    "two columns": ([("1.png", png()), ("1.json", as_json(qa(image="1.png", images=["1.png"])))], "both 'image' and 'images'"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_a_bad_member_of_a_tar_is_one_bad_row(case: str, folder: Path) -> None:
    members, says = BAD_MEMBERS[case]
    path = tar(folder / "rows.tar", *members, ("2.png", png()), ("2.txt", b"a red square"))
    with pytest.raises(UserError, match=rf"^rows.tar:1: .*{says}"):
        read_samples(path)
    assert [isinstance(row, Sample) for row in found(path)] == [False, True]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("text", ["1.txt", "1.json"])
def test_a_link_in_a_tar_is_no_image_that_may_be_left_out(kind: bytes, text: str, folder: Path) -> None:
    with tarfile.open(folder / "rows.tar", "w") as archive:
        link, row = tarfile.TarInfo("1.png"), as_json(qa())
        link.type, link.linkname = kind, "0.png"
        archive.addfile(link)
        member = tarfile.TarInfo(text)
        member.size = len(row)
        archive.addfile(member, io.BytesIO(row))
    with pytest.raises(UserError, match=r"^rows.tar:1: '1.png' is a link, a file is wanted. .*--dereference"):
        read_samples(folder / "rows.tar")


def test_a_tar_may_name_its_members_as_data_sets_name_files(folder: Path) -> None:
    row = qa(image={"bytes": None, "path": "1.png"})
    (sample,) = read_samples(tar(folder / "rows.tar", ("1.png", png()), ("1.json", as_json(row))))
    assert sample.images == (png(),)

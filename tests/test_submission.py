import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmlib.data.submission import (
    answered,
    check_as_script,
    count_unknown,
    read_as_script,
    read_result,
    read_train_truth,
    read_val_truth,
    write_result,
    write_train_truth,
    write_val_truth,
)


def write(tmp_path, text):
    (tmp_path / "file.txt").write_bytes(text.encode())
    return tmp_path / "file.txt"


def test_train_truth_is_read(tmp_path):
    truth = read_train_truth(write(tmp_path, "A.mp4 191\nB.mp4 7\n"))
    assert truth["clip"].tolist() == ["A", "B"] and truth["identity"].tolist() == ["191", "7"]


def test_val_truth_keeps_order_and_empty_lines(tmp_path):
    truth = read_val_truth(write(tmp_path, "2 A.mp4 B.mp4 \n1 \n3 C.mp4\n"))
    assert truth == (["2", "1", "3"], [["A", "B"], [], ["C"]])


@pytest.mark.parametrize(
    "text",
    ["1 A.mp4 B.mp4\r\n2\r\n", "1  A.mp4 B.mp4  \n2\t\n\n\n", "\ufeff1 A.mp4 B.mp4\n2", "1 A.mp4 B.mp4\n2\n \r\n\r\n"],
)
def test_line_ends_spaces_and_empty_lines_at_the_end_are_read(tmp_path, text):
    for read in (read_val_truth, read_result):
        assert read(write(tmp_path, text)) == (["1", "2"], [["A", "B"], []])


@pytest.mark.parametrize(
    "read, text, named",
    [
        (read_train_truth, "A.mp4 1\nB.mp4\n", "line 2: expected 'CLIP.mp4 IDENTITY', got 'B.mp4'"),
        (read_train_truth, "A.mp4 1 2\n", "line 1: .* got 'A.mp4 1 2'"),
        (read_train_truth, "1 A.mp4\n", "line 1"),
        (read_train_truth, "A.mp4 1\nA.mp4 2\n", "line 2: clip A is named twice, first on line 1"),
        (read_train_truth, "\n", "empty"),
        (read_val_truth, "", "empty"),
        (read_val_truth, "1 A.mp4\n\n2 B.mp4\n", "line 2: expected 'IDENTITY CLIP.mp4"),
        (read_val_truth, "1 A.mp4\nB.mp4 C.mp4\n", "line 2: .* got 'B.mp4 C.mp4'"),
        (read_result, "1 A.mp4 B\n", "line 1: .* got '1 A.mp4 B', of which word 3 is 'B'$"),
        (read_result, f"1 {'A.mp4 ' * 99}B C.mp4\n", r"line 1: .* got '1 A.mp4 .* \.\.\.', of which word 101 is 'B'$"),
        (read_result, "1 A.mp4\r2 B.mp4", "line 1: .* of which word 3 is '2'$"),
        (read_result, f"1 {'z' * 10**5}", r"line 1: expected .{99,220} word 2 is 'z{76} \.\.\.'$"),
        (read_train_truth, f"A.mp4 1 {'z' * 10**5}", r"line 1: .{,40} got 'A.mp4 1 z{68} \.\.\.'$"),
        (read_train_truth, f"{'z' * 10**5}.mp4 1\n" * 2, r"line 2: clip z{76} \.\.\. is named twice, first on line 1$"),
    ],
)
def test_a_malformed_line_is_refused_with_its_number_and_text(tmp_path, read, text, named):
    with pytest.raises(ValueError, match=f"file.txt.*{named}"):
        read(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "file.txt").write_bytes(b"1 \xff.mp4")
    with pytest.raises(ValueError, match="byte 2 is 0xff"):
        read_result(tmp_path / "file.txt")


def test_a_result_line_over_a_hundred_clips_is_refused(tmp_path):
    clips = " ".join(f"{i}.mp4" for i in range(101))
    with pytest.raises(ValueError, match="line 2: 101 clips, at most 100"):
        read_result(write(tmp_path, f"1 A.mp4\n2 {clips}\n"))


@pytest.mark.parametrize("blank", ["", " ", "  "])
def test_a_line_of_an_identity_that_the_truth_lacks_may_be_longer(tmp_path, blank):
    path = write(tmp_path, "1 A.mp4\n2 " + " ".join(f"{i}.mp4" for i in range(101)) + blank)
    assert list(map(len, read_result(path, known={"1"})[1])) == [1, 101]
    with pytest.raises(ValueError, match="line 2: 101 clips"):
        read_result(path, known={"1", "2"})


PARTS = ["1", "2", "a.mp4", "b.mp4", "\u00e9.mp4", "a.mp4.mp4", ".mp4", "mp4", " ", " ", "  ", "\t", "\x0c", "\x00"]
ENDS = ["\n", "\n", " \n", "\r\n", "\r", "\x1c", "\u3000", "\ufeff"]


def read_word_by_word(text):
    lines = [line.split() for line in text.removeprefix("\ufeff").rstrip().split("\n")]
    for number, (name, *clips) in enumerate((words or [""] for words in lines), 1):
        if not name or any(not word.endswith(".mp4") or word == ".mp4" for word in clips):
            return f"line {number}:"
        if name.endswith(".mp4") and name != ".mp4":
            return f"line {number}:"
    return [words[0] for words in lines], [[word.removesuffix(".mp4") for word in words[1:]] for words in lines]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["1", "22"]), st.lists(st.sampled_from(PARTS)), st.sampled_from(ENDS))))
def test_all_words_at_once_are_what_they_are_one_by_one(tmp_path_factory, lines):
    path, text = (
        tmp_path_factory.mktemp("words") / "r",
        "".join(name + " ".join(["", *of]) + end for name, of, end in lines),
    )
    path.write_bytes(text.encode())
    expected = read_word_by_word(text) if text.removeprefix("\ufeff").strip() else "empty"
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_val_truth(path)
    else:
        assert read_val_truth(path) == expected
        assert read_val_truth(path)[1].sizes.tolist() == list(map(len, expected[1]))


@pytest.mark.parametrize("text", ["\ufeff", "\ufeff \n", "\u3000\n", " \r\n"])
def test_a_file_of_white_space_is_empty(tmp_path, text):
    for read in (read_val_truth, read_train_truth):
        with pytest.raises(ValueError, match="file.txt: empty"):
            read(write(tmp_path, text))
    assert read_result(write(tmp_path, text)) == ([], [])


def test_lists_of_clips_are_a_sequence(tmp_path):
    _, lists = read_val_truth(write(tmp_path, "1 A.mp4 B.mp4\n2\n3 C.mp4"))
    assert (len(lists), lists[0], lists[-1], lists[1:]) == (3, ["A", "B"], ["C"], [[], ["C"]])
    assert [*reversed(lists)] == [["C"], [], ["A", "B"]]
    for other in ([["A", "B"], [], ["D"]], [["A", "B"], []], [("A", "B"), (), ("C",)], None):
        assert lists != other
    with pytest.raises(IndexError):
        lists[3]


def test_the_script_takes_every_blank_at_its_word(tmp_path):
    text = "\ufeff1 A.mp4  B.mp4\tC.mp4 \r\n\n2 D.mp4\x0cE.mp4\n \n"
    assert read_as_script(write(tmp_path, text)) == (
        ["\ufeff1", "", "2", ""],
        [["A.mp4", "", "B.mp4\tC.mp4"], [], ["D.mp4\x0cE.mp4"], []],
    )
    with pytest.raises(ValueError, match="nothing.txt: missing"):
        read_as_script(tmp_path / "nothing.txt")
    (tmp_path / "file.txt").write_bytes(b"1 \xff.mp4")
    with pytest.raises(ValueError, match="byte 2 is 0xff"):
        read_as_script(tmp_path / "file.txt")


TRUTH = ["1", "2", "3"], [["a"], ["b"], []]


def test_lines_of_identities_that_the_truth_lacks_are_left_out_however_often_one_stands(tmp_path):
    assert answered("r", TRUTH, (["2", "9", "9"], [["b"], ["a"], ["x"]])) == (["2"], [["b"]])
    assert answered("r", TRUTH, (["2", "1"], [["b"], ["a"]])) == (["2", "1"], [["b"], ["a"]])
    assert answered("r", TRUTH, (["9"], [["b"]])) == ([], [])


@pytest.mark.parametrize(
    "identities, message",
    [
        (["1", "2", "3", "9"], "r, line 4: 4 lines, more than the 3 of the ground truth"),
        (["2", "9", "2"], "r, line 3: identity 2 is named twice, first on line 1"),
    ],
)
def test_lines_that_cannot_be_scored_are_refused_by_number(identities, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        answered("r", TRUTH, (identities, [["a"]] * len(identities)))


@pytest.mark.parametrize(
    "truth, result, message",
    [
        (([], []), (["1"], [["a"]]), "t: empty, so that the script would divide by 0"),
        (TRUTH, (["1"] * 4, [["a"]] * 4), "r, line 4: 4 lines, more than the 3 of the ground truth"),
        (TRUTH, (["1", "2"], [["a"], [*map(str, range(101))]]), "r, line 2: 101 clips, at most 100 are allowed"),
        (TRUTH, (["1", "3"], [["a"], []]), "t, line 3: identity 3 has no clip and is submitted, .*divide by 0"),
        (([""], [[]]), ([""], [[]]), "t, line 1: identity '' has no clip and is submitted, .*divide by 0"),
        ((["q" * 999], [[]]), (["q" * 999], [[]]), r"t, line 1: identity q{76} \.\.\. has no clip .*"),
    ],
)
def test_what_the_script_would_stop_at_is_refused_in_its_file_and_line(truth, result, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_as_script(("t", "r"), truth, result)


def test_what_the_script_does_not_look_at_is_let_through():
    many = [*map(str, range(101))]
    check_as_script(("t", "r"), TRUTH, (["9", "1", "1"], [many, many, ["a"]]))
    check_as_script(("t", "r"), (["1", "1"], [[], ["a"]]), (["1"], [["a"] * 101]))


def test_repeats_do_not_count_towards_the_hundred(tmp_path):
    clips = [f"{i}" for i in range(100)] * 2
    assert read_result(write(tmp_path, "1 " + " ".join(f"{c}.mp4" for c in clips))) == (["1"], [clips])


def test_written_truth_and_result_have_the_official_form(tmp_path):
    write_train_truth(tmp_path / "t", ["A", "B"], ["191", "2"])
    assert (tmp_path / "t").read_bytes() == b"A.mp4 191\nB.mp4 2\n"
    write_val_truth(tmp_path / "v", ["1", "2"], [["A", "B"], []])
    assert (tmp_path / "v").read_bytes() == b"1 A.mp4 B.mp4 \n2 \n"
    write_result(tmp_path / "r", ["1", "2"], np.array([[2, 0], [1, -1]]), ["A", "B", "C"])
    assert read_result(tmp_path / "r") == (["1", "2"], [["C", "A"], ["B"]])


def test_a_result_of_more_than_a_hundred_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="ranking: 101 clips"):
        write_result(tmp_path / "r", ["1"], np.zeros((1, 101), int), ["A"])
    assert not (tmp_path / "r").exists()


NO_WORDS = ["va 00 0", "va\t1", "va\n1", "va\u00a01", "va\u3000", " va", "va ", " ", "", "\ufeffva", "va\ud800"]


@pytest.mark.parametrize("name", NO_WORDS)
@pytest.mark.parametrize("kind", ["clip", "identity"])
def test_a_name_that_would_not_be_read_back_is_not_written(tmp_path, kind, name):
    clips, identities = (["va_0", name], ["Ann"]) if kind == "clip" else (["va_0"], [name])
    writers = [
        lambda path: write_result(path, identities, np.arange(len(clips))[None], clips),
        lambda path: write_val_truth(path, identities, [clips]),
        lambda path: write_train_truth(path, clips, identities * len(clips)),
    ]
    for write_file in writers:
        with pytest.raises(ValueError, match=f"{kind} {re.escape(repr(name))}"):
            write_file(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_identity_that_looks_like_a_clip_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="identity 'Ann.mp4'"):
        write_result(tmp_path / "r", ["Ann.mp4"], np.zeros((1, 1), int), ["a"])


words = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1).filter(lambda word: not word.endswith(".mp4"))


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=2, unique=True))
def test_names_of_one_word_are_read_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("words") / "r"
    write_result(path, names, np.arange(len(names))[:, None], names)
    assert read_result(path) == (names, [[name] for name in names])


@pytest.mark.parametrize(
    "result, identities, clips",
    [
        ((["1", "2"], [["a"], ["a", "b"]]), (2, 0), (2, 0)),
        ((["0", "1"], [["a", "x"], ["y"]]), (2, 1), (3, 2)),
        ((["3"], [["v/a", "B"]]), (1, 1), (2, 2)),
        ((["1"], [[]]), (1, 0), (0, 0)),
        (([], []), (0, 0), (0, 0)),
    ],
)
def test_names_that_the_truth_lacks_are_counted(result, identities, clips):
    truth = ["1", "2"], [["a", "b"], ["c"]]
    assert count_unknown(truth, result) == {"identities": identities, "clips": clips}

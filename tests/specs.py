"""Specs that step3, the C++ program and the page must all refuse, or all take.

Each is a name and what is changed in the spec of an honest classifier of images (two or more
classes, no `fixed`): a dict of keys, or a function from the honest JSON text to another text.
"""

import json

HONEST = {
    "schema": 1,
    "task": "classification",
    "classes": ["a", "b"],
    "channels": 1,
    "image_size": [8, 8],
}
NESTED = "[" * 40 + "]" * 40


def replaced(old: str, new: str):
    """A change of the JSON text itself, for what json.dumps does not write."""

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


def changed_text(text: str, change) -> str:
    """The JSON text of a spec after a change of the tables below."""
    return change(text) if callable(change) else json.dumps({**json.loads(text), **change})


REFUSED = {
    "schema true": {"schema": True},
    "schema text": {"schema": "1"},
    "schema fraction": {"schema": 1.5},
    "schema zero": {"schema": 0},
    "schema written as a fraction": replaced('"schema": 1', '"schema": 1.0'),
    "schema huge": {"schema": 2**40},
    "task": {"task": "detection"},
    "task list": {"task": ["classification"]},
    "classes none": {"classes": []},
    "classes one": {"classes": ["a"]},
    "classes text": {"classes": "ab"},
    "classes number": {"classes": ["a", 3]},
    "classes empty name": {"classes": ["a", ""]},
    "classes twice": {"classes": ["a", "a"]},
    "classes long name": {"classes": ["a", "b" * 257]},
    "classes half a surrogate": {"classes": ["a", "\ud800"]},
    "channels true": {"channels": True},
    "channels two": {"channels": 2},
    "channels text": {"channels": "1"},
    "image_size large": {"image_size": [4097, 8]},
    "image_size fraction": {"image_size": [8.5, 8]},
    "image_size zero": {"image_size": [0, 8]},
    "image_size written as a fraction": {"image_size": [8.0, 8]},
    "image_size one side": {"image_size": [8]},
    "image_size object": {"image_size": {"height": 8}},
    "fit": {"fit": "squeeze"},
    "white zero": {"white": 0},
    "white large": {"white": 65536},
    "white true": {"white": True},
    "ground": {"ground": "grey"},
    "ground level": {"ground": 255},
    "ground true": {"ground": True},
    "ground list": {"ground": ["white"]},
    "known list": {"known": []},
    "known true": {"known": True},
    "known tolerance": {"known": {"layers": [], "images": 1, "tolerance": -1}},
    "known tolerance null": {"known": {"layers": [], "images": 1, "tolerance": None}},
    "known tolerance text": {"known": {"layers": [], "images": 1, "tolerance": "1"}},
    "reject": {"reject": 1.5},
    "reject without known": {"reject": 0.99, "known": None},
    "reject true": {"reject": True},
    "reject text": {"reject": "0.99"},
    "min_probability": {"min_probability": -0.1},
    "min_probability true": {"min_probability": True},
    "promises object": {"promises": {"kind": "accuracy", "share": 0.9, "threshold": 0.5}},
    "promises of texts": {"promises": ["accuracy=0.95"]},
    "promises many": {"promises": [{"kind": "accuracy", "share": 0.9, "threshold": 0.5}] * 1025},
    "promise without a kind": {"promises": [{"share": 0.9, "threshold": 0.5}]},
    "promise of another kind": {"promises": [{"kind": "f1", "share": 0.9, "threshold": 0.5}]},
    "promise kind list": {"promises": [{"kind": ["recall"], "share": 0.9, "threshold": 0.5}]},
    "promise without a threshold": {"promises": [{"kind": "accuracy", "share": 0.9}]},
    "promise threshold null": {"promises": [{"kind": "accuracy", "share": 0.9, "threshold": None}]},
    "promise threshold large": {"promises": [{"kind": "accuracy", "share": 0.9, "threshold": 2}]},
    "promise threshold true": {"promises": [{"kind": "accuracy", "share": 0.9, "threshold": True}]},
    "promise share text": {"promises": [{"kind": "accuracy", "share": "0.9", "threshold": 0.5}]},
    "promise of recall of no class": {
        "promises": [{"kind": "recall", "share": 0.9, "threshold": 0.5}]
    },
    "promise of another class": {
        "promises": [{"kind": "recall", "name": "no class", "share": 0.9, "threshold": 0.5}]
    },
    "golden object": {"golden": {}},
    "golden text": {"golden": ["sample"]},
    "golden many": {"golden": [{}] * 65},
    "self_test_tolerance text": {"self_test_tolerance": "1e-4"},
    "self_test_tolerance negative": {"self_test_tolerance": -1e-4},
    "self_test_tolerance true": {"self_test_tolerance": True},
    "fixed true": {"fixed": True},
    "fixed without input": {"fixed": {"batch": 1}},
    "fixed batch zero": {"fixed": {"batch": 0, "input": "uint8"}},
    "fixed batch written as a fraction": {"fixed": {"batch": 1.0, "input": "uint8"}},
    "fixed input": {"fixed": {"batch": 1, "input": "int8"}},
    "fixed large": {"fixed": {"batch": 1024, "input": "uint8"}, "image_size": [4096, 4096]},
    "large number": {"parameters": 10**400},
    "large number that a double holds": {"parameters": 10**25},
    "not exact in JavaScript": {"parameters": 2**53 + 2},
    "just not exact in JavaScript": {"parameters": -(2**53) - 1},
    "half a surrogate in a key": replaced('"schema": 1', '"\\ud800": 1, "schema": 1'),
    "NaN": replaced('"schema": 1', '"extra": NaN, "schema": 1'),
    "Infinity": replaced('"schema": 1', '"extra": -Infinity, "schema": 1'),
    "beyond a double": replaced('"schema": 1', '"extra": 1e999, "schema": 1'),
    "one level too deep": replaced('"schema": 1', f'"extra": {"[" * 15}1{"]" * 15}, "schema": 1'),
    "deep": replaced('"schema": 1', f'"extra": {NESTED}, "schema": 1'),
    "very deep": replaced('"schema": 1', f'"extra": {"[" * 100_000}'),
    "large": lambda text: text + " " * (32 << 20),
    "byte order mark": lambda text: "\ufeff" + text,
    "comment": lambda text: text + "// comment",
    "trailing comma": replaced('"schema": 1', '"schema": 1, "extra": [1,]'),
    "single quotes": replaced('"schema"', "'schema'"),
    "control character": replaced('"schema": 1', '"extra": "\x01", "schema": 1'),
    "two objects": lambda text: text + text,
    "list": lambda text: "[]",
    "null": lambda text: "null",
    "text": lambda text: '"spec"',
    "cut": lambda text: text[:-1],
}
TAKEN = {
    "as it is": {},
    "a key that nobody knows": {"extra": {"deep": [[[[1]]]]}},
    "names with spaces and signs": {"classes": ["an apple", "é" * 256]},
    "names beyond the basic plane": {"classes": ["a", "\U0001f600" * 256]},
    "names that differ in case": {"classes": ["a", "A"]},
    "just deep enough": replaced('"schema": 1', f'"extra": {"[" * 15}{"]" * 15}, "schema": 1'),
    "exact in JavaScript": {"parameters": 2**53},
    "a large fraction": replaced('"schema": 1', '"extra": 1e300, "schema": 1'),
    "a tiny fraction": replaced('"schema": 1', '"extra": 1e-400, "schema": 1'),
    "shares written as fractions": {"min_probability": 1.0},
    "known without tolerance": {"known": {"layers": [], "images": 1}},
    "a key twice": replaced('"schema": 1', '"schema": 1, "schema": 1'),
    "white ground": {"ground": "white"},
    "black ground": {"ground": "black"},
    "no ground": {"ground": None},
    "no thresholds": {"reject": None, "min_probability": None},
    "no promises": {"promises": None},
    "an empty list of promises": {"promises": []},
    "a promise": {"promises": [{"kind": "accuracy", "name": None, "share": 1, "threshold": 0.5}]},
    "no golden samples": {"golden": []},
    "tolerance null": {"self_test_tolerance": None},
}

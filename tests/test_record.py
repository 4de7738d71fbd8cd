"""training/record.py: what made each file of an output folder."""
from training.record import Record
from volumes.find import Item


def test_a_row_is_of_an_input_and_a_checkpoint(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / f"{name}.npy").write_bytes(content)
        (tmp_path / f"{name}_out").write_bytes(b"")
    a, b = Item(tmp_path / "a.npy"), Item(tmp_path / "b.npy")
    record = Record(tmp_path, "checkpoint 1")
    record.write("a_out", a, done=False)
    assert not Record(tmp_path, "checkpoint 1").is_done("a_out", a), "begun is not done"
    record.write("a_out", a, done=True)
    with open(record.path, "a") as file:
        file.write('{"output": "a_out", "inp')                  # a process was killed here
    again = Record(tmp_path, "checkpoint 1")
    assert again.is_done("a_out", a) and not again.is_done("a_out", b) and not again.is_done("b_out", b)
    assert again.is_of_another_input("a_out", b) and not again.is_of_another_input("b_out", b)
    assert not Record(tmp_path, "checkpoint 2").is_done("a_out", a)
    # An input that has changed where it lies is the same input, not done; one that was moved is done.
    (tmp_path / "a.npy").rename(tmp_path / "moved.npy")
    assert Record(tmp_path, "checkpoint 1").is_done("a_out", Item(tmp_path / "moved.npy"))
    (tmp_path / "a.npy").write_bytes(b"three")
    changed = Record(tmp_path, "checkpoint 1")
    assert not changed.is_done("a_out", a) and not changed.is_of_another_input("a_out", a)

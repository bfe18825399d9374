"""Plots know of what data they were drawn."""

from benchmarks import plots


def test_a_picture_carries_the_fingerprint_of_its_data(tmp_path):
    plot = plots.PLOTS["peers"]
    data = plot.data(tmp_path)
    path = tmp_path / "peers.png"
    assert plots.fingerprint_in(path) is None
    path.write_bytes(plots.png(plot, data))
    assert plots.fingerprint_in(path) == plots.fingerprint(data)
    assert plots.fingerprint(data | {"missing": []}) != plots.fingerprint(data)

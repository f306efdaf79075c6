from angelslim.config import validate_file


def test_a_sound_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("extends: int4_rtn\nmodel: {trust_remote_code: true}\n")
    report = validate_file(path)
    assert report.ok
    assert report.path == str(path)
    assert report.dialect == "sections"
    assert report.asks_for == ["ptq rtn: W int4 per-group 128"]
    assert len(report.warnings) == 1


def test_unreadable_and_impossible_files_are_reported_not_raised(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: [")
    assert not validate_file(path).ok
    path.write_text("compression: {quantization: {name: int4_rtn, quant_method: {group_size: 0}}}")
    report = validate_file(path)
    assert report.dialect == "sections"
    assert "group_size 0" in report.errors[0]
    assert validate_file(tmp_path / "none.yaml").errors

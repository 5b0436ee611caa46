"""Small Parquet tables as Hugging Face data sets write them, one for each compression: a preference in messages, a text
prompt with a null, a list of answers with scores. Writes parquet/*.parquet. Nothing is random.
Printed with pyarrow 26.0.1.
"""
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

out = pathlib.Path(__file__).parent / "parquet"
turn = pa.struct([("role", pa.string()), ("content", pa.string())])
say = lambda role, content: dict(role=role, content=content)
rows = 5
chosen = [[say("user", f"q{i} é"), say("assistant", f"good {i}")] for i in range(rows)]
rejected = [[say("user", f"q{i} é"), say("assistant", f"bad {i}")] for i in range(rows)]
messages = pa.table(dict(
    chosen=pa.array(chosen, pa.list_(turn)), rejected=pa.array(rejected, pa.list_(turn)),
    score_chosen=pa.array([float(i) for i in range(rows)])))
for codec in ["snappy", "zstd", "gzip", "lz4", "brotli", "none"]:
    pq.write_table(messages, out / f"messages-{codec}.parquet", compression=codec, row_group_size=2)
ranked = pa.table(dict(
    prompt=pa.array(["first", "second"]),
    responses=pa.array([["a", "b"], ["c", "d", "e"]]),
    scores=pa.array([[1.0, 2.0], [3.0, 1.5, 2.0]])))
pq.write_table(ranked, out / "ranked.parquet", compression="zstd", version="2.6", data_page_version="2.0")
holes = pa.table(dict(instruction=pa.array(["one", "two"]), input=pa.array([None, "more"]),
                      output=pa.array(["1", None]), system=pa.array([None, None], pa.string())))
pq.write_table(holes, out / "holes.parquet")
raw = pa.table(dict(text=pa.array([b"fine", b"\xff\xfe broken"], pa.binary())))
pq.write_table(raw, out / "bytes.parquet")
image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
unread = pa.table(dict(
    text=pa.array(["one", "two"]), image=pa.array([dict(bytes=b"\x89PNG\xff", path="a.png"), None], image),
    raw=pa.array([b"\xff\xfe", b"fine"], pa.binary()),
    embedding=pa.array([[0.5, float("nan")], [float("inf")]], pa.list_(pa.float32()))))
pq.write_table(unread, out / "unread.parquet", compression="brotli")

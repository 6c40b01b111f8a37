"""Documents from the standard library or a user's files, read as a stream.

`data.source` is `stdlib` (source and documentation text of the Python standard
library found on the machine: real text, everywhere, no download) or one of

* a file: .jsonl (a row a line), .parquet, .arrow, or else one UTF-8 text;
* a glob of such files;
* a directory of such files, searched recursively, links to others as well;
* a Hugging Face dataset saved on disk: a directory with its `state.json` or
  `dataset_info.json` and .arrow files.

Rows have their text in the column `data.text_field`.  A text file larger than
`PIECE_BYTES` becomes several documents, cut at line ends, and tables are read
in batches of rows, so that a file may be larger than memory.
"""

import collections
import functools
import glob
import json
import os
import pathlib
import sysconfig
from collections.abc import Callable, Iterator

from deepseek_jax import config as config_lib

PIECE_BYTES = 1 << 20
_PROSE = ('.txt', '.md', '.rst', '.tex')
_CODE = ('.py', '.c', '.h', '.cc', '.cpp', '.cu', '.java', '.js', '.ts', '.go')
TEXT_SUFFIXES = (*_PROSE, *_CODE, '.rs', '.rb', '.sh', '.sql', '.lean')
_STDLIB_SUFFIXES = (*_PROSE, '.py')
# Installed packages are not the library, and its tests are 60 % of the text.
_STDLIB_SKIPPED = {
  'site-packages',
  'dist-packages',
  'test',
  'tests',
  'idle_test',
}

Document = tuple[str, str]  # Name, text.


def find_files(config: config_lib.DataConfig) -> dict[str, pathlib.Path]:
  """The files of `config.source` by name, in the order they are read.

  A name is the path relative to the source and with `/`, so that it is the same
  on every machine.

  Raises:
    ValueError: no file matches, a saved dataset holds several splits, or a link
      leads to nothing, or to what is read without it.
  """
  if config.source == 'stdlib':
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    found = _walk(root, _STDLIB_SUFFIXES, _STDLIB_SKIPPED)
  else:
    root, found = _find_users(os.path.expanduser(config.source))
    _check_links(found)
  if not found:
    raise ValueError(
      f'data.source={config.source!r}: no file found; give a file, a glob, '
      f'stdlib, or a directory with files {" ".join(_READERS)} '
      f'{" ".join(TEXT_SUFFIXES)}'
    )
  return {path.relative_to(root).as_posix(): path for path in found}


def passed_over(config: config_lib.DataConfig) -> collections.Counter[str]:
  """Files of a user's directory that are not read, counted by suffix."""
  root = pathlib.Path(config.source).expanduser()
  if config.source == 'stdlib' or not root.is_dir() or _saved_files(root):
    return collections.Counter()
  read = set(find_files(config).values())
  others = [path for path in _walk(root, ('',), set()) if path not in read]
  return collections.Counter(path.suffix.lower() for path in others)


def documents(config: config_lib.DataConfig) -> Iterator[Document]:
  """Every non-empty document of `config.source` with its name, in fixed order.

  A text file is named by `find_files`, a piece of a large one `file#0`,
  `file#1`, ..., a row of a table likewise (JSONL counts lines, from 1).  Files
  of the standard library that are not UTF-8 text are left out; of a user's
  directory, those of other suffixes (`passed_over`).

  Raises:
    ValueError: naming file and line, row or byte: text that is not UTF-8 or
      holds a NUL, malformed JSON or table, no column `config.text_field`, or a
      value in it that is neither a string nor null.
  """
  for name, path in find_files(config).items():
    suffix = path.suffix.lower()
    read = _READERS.get(suffix, _read_text)
    try:
      for key, text in read(path, config.text_field):
        if text:
          _check_text(f'{path}{key}', text)
          yield f'{name}{key}', text
    except ValueError:
      if config.source != 'stdlib':
        raise


def _find_users(source: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
  """The root that names are relative to, and the files, sorted."""
  path = pathlib.Path(source)
  if path.is_file():
    return path.parent, [path]
  if (path / 'dataset_dict.json').is_file():
    splits = sorted(p.name for p in path.iterdir() if p.is_dir())
    raise ValueError(
      f'data.source={source!r}: the dataset has the splits '
      f'{", ".join(splits)}; name one, as in {path / splits[0]}'
    )
  if saved := _saved_files(path):
    return path, saved
  if path.is_dir():
    return path, _walk(path, (*_READERS, *TEXT_SUFFIXES), set())
  parts = path.parts
  fixed = next((i for i, p in enumerate(parts) if glob.has_magic(p)), 0)
  found, checked, seen = [], set(), {}
  for path in map(pathlib.Path, glob.iglob(source, recursive=True)):
    if not path.is_dir():
      found.append(path)
      if path.parent not in checked:
        checked.add(path.parent)
        _check_once(path.parent, seen)
  return pathlib.Path(*parts[:fixed]), sorted(found)


def _saved_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Those of a saved dataset, in its order; none if it is a plain directory."""
  try:
    state = json.loads((folder / 'state.json').read_bytes())
    return [folder / data['filename'] for data in state['_data_files']]
  except (OSError, ValueError, LookupError, TypeError):
    pass  # Other programs, too, have a file of this name.
  has_info = (folder / 'dataset_info.json').is_file()
  return sorted(folder.glob('*.arrow')) if has_info else []


def _walk(
  root: pathlib.Path, suffixes: tuple[str, ...], skipped: set[str]
) -> list[pathlib.Path]:
  """Files below `root` with these suffixes, sorted; none that are hidden."""
  found, seen = [], {}
  for folder, folders, files in os.walk(root, followlinks=True):
    _check_once(pathlib.Path(folder), seen)
    folders[:] = sorted(f for f in folders if f[0] != '.' and f not in skipped)
    found += [
      pathlib.Path(folder, f)
      for f in files
      if f[0] != '.' and f.lower().endswith(suffixes)
    ]
  return sorted(found)


def _check_once(
  folder: pathlib.Path, seen: dict[pathlib.Path, pathlib.Path]
) -> None:
  """Refuses a directory that is among those `seen`, which it joins.

  By a link one comes twice, or for ever if the link leads to one around it.
  """
  first = seen.setdefault(folder.resolve(), folder)
  if first != folder:
    raise ValueError(
      f'data.source: {first} and {folder} are one directory, which would be '
      'read twice; remove the link between them, or name what is to be read'
    )


def _check_links(found: list[pathlib.Path]) -> None:
  """Refuses a link to nothing, or to a file that is itself among `found`."""
  links = [path for path in found if path.is_symlink()]
  if not links:
    return
  files = {path.resolve(): path for path in found if not path.is_symlink()}
  for link in links:
    if not link.exists():
      raise ValueError(
        f'data.source: the link {link} leads to no file; remove or mend it'
      )
    if (file := files.get(link.resolve())) is not None:
      raise ValueError(
        f'data.source: the link {link} leads to {file}, which would be read '
        'twice; remove the link, or name what is to be read'
      )


def _check_text(where: str, text: str) -> None:
  """Refuses what UTF-8 cannot hold and what only binary files have."""
  nul = text.find('\0')
  if nul >= 0:
    raise ValueError(
      f'{where}: NUL at character {nul}; is it binary? Leave it out of '
      'data.source or remove the NUL'
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{where}: lone surrogate at character {error.start}, which is not '
      'Unicode text; remove or pair it'
    ) from None


def _pieces(path: pathlib.Path) -> Iterator[bytes]:
  """The bytes of a file in pieces of at most `PIECE_BYTES`, cut at line ends.

  A line longer than that is cut between two characters.
  """
  rest = b''
  with path.open('rb') as file:
    while chunk := rest + file.read(PIECE_BYTES - len(rest)):
      cut = len(chunk)
      if cut == PIECE_BYTES:
        cut = chunk.rfind(b'\n') + 1 or _last_character(chunk)
      yield chunk[:cut]
      rest = chunk[cut:]


def _last_character(data: bytes) -> int:
  """Where the last character of UTF-8 begins, whether or not it is whole."""
  start = len(data) - 1
  # A byte 10xxxxxx continues a character; at most three of them follow.
  while start > len(data) - 4 and data[start] & 0xC0 == 0x80:
    start -= 1
  return start


def _read_text(path: pathlib.Path, field: str) -> Iterator[Document]:
  del field
  small = path.stat().st_size < PIECE_BYTES
  offset, line = 0, 1
  for i, data in enumerate(_pieces(path)):
    try:
      text = data.decode()
    except UnicodeDecodeError as error:
      line += data.count(b'\n', 0, error.start)
      raise ValueError(
        f'{path}: byte {offset + error.start} in line {line} is not UTF-8; '
        'convert the file to UTF-8 or leave it out of data.source'
      ) from None
    yield '' if small else f'#{i}', text
    offset += len(data)
    line += data.count(b'\n')


def _string(where: str, value: object, field: str) -> str:
  """A row's text; null is an empty document."""
  if value is None:
    return ''
  if not isinstance(value, str):
    raise ValueError(
      f'{where}: {field!r} is of type {type(value).__name__}, not a string; '
      'choose another column with data.text_field'
    )
  return value


def _column_error(where: str, field: str, columns: list[str]) -> ValueError:
  return ValueError(
    f'{where}: no column data.text_field={field!r}; '
    f'it has {", ".join(map(repr, columns))}'
  )


def _read_jsonl(path: pathlib.Path, field: str) -> Iterator[Document]:
  with path.open('rb') as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      where = f'{path}, line {number}'
      try:
        row = json.loads(line)
      except ValueError as error:  # Malformed JSON, or bytes not UTF-8.
        raise ValueError(f'{where}: {error}; write a JSON object') from None
      if not isinstance(row, dict):
        raise ValueError(f'{where}: not a JSON object')
      if field not in row:
        raise _column_error(where, field, list(row))
      yield f'#{number}', _string(where, row[field], field)


def _read_table(
  open_batches: Callable, path: pathlib.Path, field: str
) -> Iterator[Document]:
  """Rows of an Arrow table, of which one batch is in memory at a time."""
  import pyarrow as pa

  row = 0
  try:
    columns, batches = open_batches(path, field)
    if field not in columns:
      raise _column_error(str(path), field, columns)
    for batch in batches:
      for value in batch.column(field):
        text = _string(f'{path}, row {row}', value.as_py(), field)
        yield f'#{row}', text
        row += 1
  except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
    raise ValueError(f'{path}, row {row} or after: {error}') from None


def _open_parquet(path: pathlib.Path, field: str):
  import pyarrow.parquet as pq

  # By default pyarrow keeps what it reads ahead, in the end the whole file.
  file = pq.ParquetFile(path, pre_buffer=False)
  batches = file.iter_batches(batch_size=1024, columns=[field])
  return file.schema_arrow.names, batches


def _open_arrow(path: pathlib.Path, field: str):
  """A file as `datasets` writes it (a stream) or as others do (Feather)."""
  import pyarrow as pa

  del field
  source = pa.memory_map(str(path))
  if source.read(6) == b'ARROW1':
    reader = pa.ipc.open_file(source)
    batches = map(reader.get_batch, range(reader.num_record_batches))
    return reader.schema.names, batches
  source.seek(0)
  reader = pa.ipc.open_stream(source)
  return reader.schema.names, reader


_READERS: dict[str, Callable[..., Iterator[Document]]] = {
  '.jsonl': _read_jsonl,
  '.parquet': functools.partial(_read_table, _open_parquet),
  '.arrow': functools.partial(_read_table, _open_arrow),
}

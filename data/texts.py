"""The lists that `csv` reads, as rows of cells."""

import os

from data.lookup import Folders, split_path
from inference.lists import Table, names_image, read_list

HINT = "--data-dir takes a directory of class folders, or a list"


def read_table(file: str, root: str | None = None) -> Table:
    """Read a list, whatever its form.

    root: the folder that its paths are relative to, if not its own. Raises Problem.
    """
    root = root or os.path.dirname(file)

    def is_data(first_row: list[str], has_spaces: bool) -> bool:
        if names_image(first_row, root):
            return True
        # Lists with spaces hardly ever name their columns, and their paths may lack the suffix.
        return has_spaces and Folders().find(root, split_path(first_row[0])) is not None

    return read_list(file, is_data, HINT)

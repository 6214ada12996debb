"""Execute examples/quickstart.ipynb in a new folder, and save it with its outputs: `make notebook`.

The digest of the executed code is saved too, with which a test finds a notebook whose code was changed afterwards.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
DIGEST = "sha256_of_executed_code"  # key in the metadata of the notebook
CELL_SECONDS = 7200


def digest_of(sources: list[str]) -> str:
    """Return the SHA-256 digest of the sources of all code cells."""
    return hashlib.sha256("\n\n".join(sources).encode()).hexdigest()


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=CELL_SECONDS, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings on the standard error are those of one machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    notebook.metadata[DIGEST] = digest_of([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()

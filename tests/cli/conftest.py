"""A trained model and its data in files, and the command line in this process."""

import keras
import numpy as np
import pytest
from click.testing import CliRunner

from keras_precision.cli import digits, main


@pytest.fixture
def run():
    """Runs the command line in this process; gives its exit code and outputs."""
    return lambda *arguments: CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory with `model.keras`, the digits network after two epochs, and images it has not seen."""
    directory = tmp_path_factory.mktemp("trained")
    keras.utils.clear_session()  # or layers' names would go on from those of other tests
    keras.utils.set_random_seed(0)
    split = digits.load_digits_split(0)
    model = digits.build_digits_model()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(split.train_images, split.train_labels, batch_size=32, epochs=2, verbose=0)
    model.save(directory / "model.keras")
    np.savez(directory / "validation.npz", x=split.test_images, y=split.test_labels)
    np.save(directory / "x.npy", split.test_images)
    np.save(directory / "y.npy", split.test_labels)
    return directory


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """The working directory: empty but for links to what `trained` holds."""
    for path in trained.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path

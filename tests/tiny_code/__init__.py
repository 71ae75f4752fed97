"""A TensorFlow data set that the tests write: its builder must be in a package of its own."""

import tensorflow_datasets as tfds

NUM_DOCUMENTS = 25


class TinyCode(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {name: tfds.features.Text() for name in ("text", "path", "language")}
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(NUM_DOCUMENTS):
            yield i, {"text": f"x = {i}\n", "path": f"{i}.py", "language": "Python"}

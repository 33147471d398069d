"""What methods need of a dataset, as folders of files found by what they were made from."""

from rayexpand.artifacts.adapter import AdapterKind
from rayexpand.artifacts.captions import CaptionsKind
from rayexpand.artifacts.class_features import ClassFeaturesKind
from rayexpand.artifacts.image_features import ImageFeaturesKind
from rayexpand.artifacts.kinds import ArtifactKind
from rayexpand.artifacts.prototypes import PrototypesKind
from rayexpand.artifacts.thresholds import ThresholdsKind

KINDS: dict[str, ArtifactKind] = {kind.name: kind for kind in (
    PrototypesKind(), AdapterKind(), ClassFeaturesKind(), ImageFeaturesKind(), CaptionsKind(), ThresholdsKind())}

"""The recipe of VisualBERT's second phase: trained on with the texts and images of a task (spec VisualBERT §2)."""

from typing import ClassVar, Literal

from pydantic import Field

from xdscale.recipe import OBJECTIVE_WEIGHT, NameOrPath, Objectives, Section
from xdscale.recipes.mlm.schema import MaskedLM
from xdscale.recipes.visualbert.schema import TaskInput, VisualBERTRecipe, VisualModel


class TaskFolders(Section):
    """Where the task's files and its images' regions are; their hashes stand in every checkpoint."""

    folder: NameOrPath = Field(description="the folder that holds the tasks' folders, as for 'xdscale finetune --data'")
    regions: NameOrPath = Field(description="dataset with the regions of the images")


class TaskModel(VisualModel, TaskInput):
    """The BERT that it is made of, how it reads regions, and what it reads of a task."""


class Truth(Section):
    """Is the sentence true of its images, or the choice the right one? For tasks that say so."""

    weight: float = OBJECTIVE_WEIGHT


class VisualBERTTaskObjectives(Objectives):
    """Those that are on."""

    mlm: MaskedLM | None = MaskedLM()
    match: Truth | None = None


class VisualBERTTaskRecipe(VisualBERTRecipe):
    """Everything that decides the result of pretraining on a task's texts."""

    implementation: ClassVar[str] = "xdscale.tasks.visualbert_pretraining:VisualBERTTaskSystem"

    system: Literal["visualbert_task"] = Field(description="the system that is trained")
    task: str = Field(description="vqa, nlvr2, vcr_qa, vcr_qar, flickr30k_entities, or one of yours that has images")
    model: TaskModel
    objectives: VisualBERTTaskObjectives = VisualBERTTaskObjectives()
    data: TaskFolders

    def problem(self) -> str | None:
        """Returns what is inconsistent, if anything is."""
        if self.run.max_damaged_shards:
            return (
                f"run.max_damaged_shards = {self.run.max_damaged_shards}: a task's sentences need all of its images; "
                "leave it out, and copy damaged shards again"
            )
        return super().problem()

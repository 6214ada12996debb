"""Distill an image classifier into a smaller one.

For: a classifier that must run on a phone or a CPU.
Needs: one GPU with 8 GB (an estimate), and `pip install . pillow`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/image_classifier.py --dataset photos --teacher models/vit-base-photos

The teacher must be a classifier of the data set's classes: fine-tune it first. The data set has the columns `image` and
`label`; a local folder has one subfolder of images for each class.
"""

import argparse
from pathlib import Path

import torch
from datasets import ClassLabel, Image, load_dataset
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from hf_distill import DistillConfig, DistillTrainer, DualProcessorCollator

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="WinKawaks/vit-tiny-patch16-224")
parser.add_argument("--teacher", required=True, help="a classifier that was fine-tuned on the data set")
parser.add_argument("--dataset", default="ethz/food101", help="Hub id, or a folder with one subfolder for each class")
parser.add_argument("--output_dir", default="runs/image-classifier")
parser.add_argument("--max_steps", type=int, default=5000)
parser.add_argument("--batch_size", type=int, default=64)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--held_out_share", type=float, default=0.1)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

is_folder = Path(arguments.dataset).is_dir()
source = {"path": "imagefolder", "data_dir": arguments.dataset} if is_folder else {"path": arguments.dataset}
images = load_dataset(**source, split="train")
if "image" not in images.features or not isinstance(images.features.get("label"), ClassLabel):
    raise SystemExit(f"The script reads an image and a label with the names of its classes; found {images.features}.")
images = images.cast_column("image", Image(mode="RGB"))  # the models read three colors
parts = images.train_test_split(arguments.held_out_share, seed=0)
teacher = AutoModelForImageClassification.from_pretrained(arguments.teacher)
names = images.features["label"].names
if [teacher.config.id2label[i] for i in range(teacher.config.num_labels)] != names:
    raise SystemExit(f"The teacher's classes are {teacher.config.id2label}, and those of the data set are {names}.")
config = AutoConfig.from_pretrained(
    arguments.student, id2label=teacher.config.id2label, label2id=teacher.config.label2id
)
student = AutoModelForImageClassification.from_pretrained(
    arguments.student, config=config, ignore_mismatched_sizes=True
)  # its head is new

processor = AutoImageProcessor.from_pretrained(arguments.student)
teacher_processor = AutoImageProcessor.from_pretrained(arguments.teacher)
trainer = DistillTrainer(
    model=student,
    teacher=teacher,
    args=DistillConfig(
        arguments.output_dir,
        temperature=2.0,
        alpha=0.5,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    data_collator=DualProcessorCollator(processor, teacher_processor),  # each model reads its own image size
    train_dataset=parts["train"],
    eval_dataset=parts["test"],
    processing_class=processor,
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
for name in ("eval_kl", "eval_agreement", "eval_accuracy"):
    print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()  # the student and its image processor
trainer.save_metrics("eval", after)

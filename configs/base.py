"""Every field of an experiment, with its unit and the default of the paper.

The values are those of the paper's CIFAR-10 experiment (Wei, Zhu and Zhang, 2023,
Section 5.1, and its PyTorch code where the paper is silent). A config file starts from
`base_config()`, changes what differs, and ends with `finish(config, row)`. On the
command line: `--config.training.epochs=2`.

Each training method has a section beside these, whose fields are the parameters of its
constructor, radii and steps in 1/255 units: `config.attack` those of
`samrobust.training.adversaries.at.at`, `config.trades` of
`...objectives.trades.trades`, `config.sam`, `config.asam` and so on of the functions in
`samrobust.sharpness`, `config.ema` and so on of those in `...averaging`; what is more
in them, and what each field means, is shown by
`samrobust config --config=cifar10:sam,rho=0.2`. A row sets what it names.
"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns the unlocked base config."""
    config = ConfigDict()

    # What is trained; set by the row, as in `configs/cifar10.py:sam,rho=0.2`.
    config.row = ""
    config.label = ""
    # Every random number is a function of the seed, below 2**32, and the step.
    config.seed = 0
    # The paper's accuracies in percent for this row, printed beside ours; dropped where
    # an override makes another experiment of it.
    config.paper = ConfigDict()

    config.data = ConfigDict()
    # cifar10, cifar100 or digits; another image classification data set of TFDS, as
    # prepared; an .npz file or ./FOLDER of class folders; `package.module:function`.
    config.data.name = "cifar10"
    # Where TFDS datasets lie; None: $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    config.data.data_dir = config_dict.placeholder(str)
    # Where an official archive was put by hand; None: <data_dir>/downloads/manual.
    config.data.manual_dir = config_dict.placeholder(str)
    # Training examples held out, to choose by; the test set is for the result alone.
    config.data.validation_size = 0
    # Numbers of examples; None: all that are left.
    config.data.train_size = config_dict.placeholder(int)
    config.data.test_size = config_dict.placeholder(int)
    # Seed of the choice of held-out and kept examples; the same for all runs.
    config.data.split_seed = 0
    # Augmentation: reflect-pad by this many pixels and crop at random; 0: none.
    config.data.padding = 4
    config.data.flip = True  # augmentation: mirror left-right at random
    # Further augmentation, `package.module:function` (images, *, key); empty: none.
    config.data.augmentation = ""

    config.model = ConfigDict()
    # A name in `samrobust.models.MODELS`, or `package.module:name`. The network's own
    # fields follow: of preact_resnet width (64) and blocks (2, 2, 2, 2).
    config.model.name = "preact_resnet"
    config.model.dtype = "float32"  # of convolutions and activations; or bfloat16
    # Examples over which BatchNorm normalizes in training, consecutive ones of a batch;
    # divides `training.batch_size`. 0: the global batch, over all devices.
    config.model.batch_norm_group = 0
    # Of the pixels in [0, 1], by channel, subtracted and divided by; None: the data
    # set's. Imported networks bring their own.
    config.model.mean = config_dict.placeholder(tuple)
    config.model.std = config_dict.placeholder(tuple)

    config.training = ConfigDict()
    config.training.epochs = 100  # passes over the training images
    config.training.batch_size = 128  # over all devices
    # Whether an incomplete last batch of an epoch is left out.
    config.training.drop_remainder = False
    # sgd, adam or adamw, of which `momentum` is b1; or `package.module:name`.
    config.training.optimizer = "sgd"
    config.training.learning_rate = 0.1  # at its highest
    config.training.schedule = "step"  # or cosine (to 0); or cyclic (from 0 and back)
    # For `step`: fractions of the epochs after which the rate is multiplied by
    # `decay_factor`, rounded up to whole ones: after 23 of 30.
    config.training.milestones = (0.75, 0.9)
    config.training.decay_factor = 0.1
    config.training.momentum = 0.9  # or b1 of Adam and AdamW
    # Coupled, on all parameters: normalization and biases too.
    config.training.weight_decay = 5e-4
    # Steps in one call of the device (`lax.scan`); 0: 1 on CPU, on GPU and TPU about 25
    # that divide an epoch's full batches.
    config.training.steps_per_call = 0
    # On GPUs, take the slower algorithms that XLA calls deterministic, so that a killed
    # run ends as one that was not (not yet measured). On CPUs all runs do.
    config.training.deterministic = False

    config.evaluation = ConfigDict()
    config.evaluation.linf = (1.0, 2.0)  # radii, in 1/255
    config.evaluation.l2 = (16.0, 32.0)  # radii, in 1/255
    config.evaluation.attack = "pgd"  # or autoattack, which uses version and members
    # Of AutoAttack; or rand; or custom, with members.
    config.evaluation.version = "standard"
    config.evaluation.members = ()  # of apgd-ce, apgd-t, fab-t, square, apgd-dlr
    # Step size of PGD as a fraction of the radius.
    config.evaluation.linf_step = 0.25
    config.evaluation.l2_step = 0.125
    config.evaluation.num_steps = 10  # of PGD
    config.evaluation.random_start = True  # of PGD, in the ball
    config.evaluation.restarts = 1  # of PGD; each example keeps its worst case
    config.evaluation.loss = "cross_entropy"  # of PGD; or margin
    config.evaluation.judge = "final"  # iterate of PGD judged; or any
    # Leave broken examples out of further steps; for judge=any, where nothing changes.
    config.evaluation.early_stop = False
    # See `samrobust.attacks.l2`: the reference code's, at its batch of 1024.
    config.evaluation.gradient_floor = 1024e-10
    config.evaluation.batch_size = 0  # over all devices; 0: 500 for each
    config.evaluation.split = "test"  # or validation, to choose hyper-parameters
    config.evaluation.checkpoint = "last"  # best (on the validation examples); both

    config.checkpoint = ConfigDict()
    config.checkpoint.minutes = 5.0  # time between checkpoints; a kill costs no more
    config.checkpoint.keep = 2  # newest ones kept

    # Where the lines of metrics.jsonl are shown as well; that file stays the truth.
    config.tracking = ConfigDict()
    config.tracking.tensorboard = False  # event files in the workdir; tensorboardX
    config.tracking.wandb = ""  # project at Weights & Biases; empty: off
    return config

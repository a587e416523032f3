"""What any trainer needs and is not diffusion; imports nothing of ours, and no torch by itself.

    errors          UserError, one line per mistake, exit codes
    bars            progress bars
    files           files that appear whole or not at all
    provenance      which commit, versions and machine made a result
    memory          how much memory there is, and what to say when it is not enough
    gestures        the table of gesture types
    contacts        touches in a window, one by one; their shake
    gesture_files   `*_actions.npy`, `*_context.npy` and dataset.json: reader and writer
    data_gate       what a training and a validation set must be
    data_rules      options that the training set decides
    loaders         what a DataLoader visits, as one tensor
    knobs           a dataclass of options as checks and as a command line
    process         ranks, devices, signals, progress bars, the lock of a run folder
    checkpoint      save and load, whole or refused
    tensors         what public functions take, draw, and run in batches
    state           what is trained, and where a run stands
    run             a run in its folder: lock, log, signals, when it saves
    run_log         metrics.jsonl, figures, tables and their W&B mirror
    figures         gestures drawn side by side
    metrics         scores of recreations, types of gestures
    summary         what a run prints
    tables          numbers and tables for readers, in Markdown
    contact_chain   which frames are pressed, in the light of all, and of how long contacts last
    curves          what the curve of a contact was before it was noised
    returns         contacts at the place of the one before
    lessons         what a trained denoiser teaches about curves
    known           known frames: which are given, and what they tell the others
    augment         the symmetries of generated gestures
    legendre        orthogonal polynomials, and what contacts are in them
    shapes          what the motions of contacts have in common, in place of polynomials
    muon            the optimizer

errors, bars, files, provenance, memory, gestures, contacts, gesture_files and data_gate need numpy
alone.
"""

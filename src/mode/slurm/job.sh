#!/bin/bash
# The job of one training: job.sh FOLDER COMMAND ..., in the project's folder. Its exit code is left in FOLDER/exit.
#
# A submission of which nobody knows whether it arrived is made again under the same name, and both jobs may come to run.
# The first one notes its number in FOLDER/claim, which cannot be written twice; the other one does nothing, and neither
# does a job of an earlier submission: FOLDER/name has the name of the present one. A requeued job keeps its number.
#
# The command is a step: Slurm's notices (SIGTERM before the time limit, and at a preemption) go to steps, and not to this
# script. Nothing is filled in here; sbatch passes arguments on as they are.
folder=$1
shift
fail() {
    echo "error: job $SLURM_JOB_ID: $PWD/$folder$1" >&2
    exit 1
}
[ -d "$folder" ] || fail ": no such folder on $HOSTNAME (nodes have to see the project under the same path)"
[ "$(cat -- "$folder/name" 2> /dev/null)" = "$SLURM_JOB_NAME" ] || exit 0
(set -o noclobber; echo "$SLURM_JOB_ID" > "$folder/claim") 2> /dev/null
claim=$(cat -- "$folder/claim" 2> /dev/null)
[ -n "$claim" ] || fail "/claim: cannot be written on $HOSTNAME (is the disk full, or read-only?)"
[ "$claim" = "$SLURM_JOB_ID" ] || exit 0
rm -f -- "$folder/exit"
# srun takes the number of cores from no other variable.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 "$@"
code=$?
echo "$code" > "$folder/exit"
exit "$code"

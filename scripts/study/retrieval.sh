#!/usr/bin/env bash
# Simulates retrieval beside matched tokens, and other reference queries (docs/quality.md).
#
#   scripts/study/retrieval.sh MODEL PROFILE OUT [PART ...]
#
# Parts are prose-N, labels-N, queries-N, finders-N, bounds-N and pages-N for prompts of N tokens. They run at the same time, one
# process and one file of rows each; without a part, prose and labels at 4,096 and 16,384 tokens.
# TEXTS (4, of bounds and pages 18) of prose, CHAINS (1, of finders 2, of bounds and pages 6) of questions of each wording, FACTS (32) of
# each chain and BUDGETS ("0.1 0.05") make it smaller. FIRST_TEXT (0) and FIRST_CHAIN (0) go on where an earlier run
# ended.
# A GPU is used where there is one; DTYPE (float32) bfloat16 fits 32,000 tokens on it.
set -euo pipefail

model=$1 profile=$2 out=$3
parts=("${@:4}")
read -ra budgets <<< "${BUDGETS:-0.1 0.05}"
[ ${#parts[@]} -gt 0 ] || parts=(prose-4096 prose-16384 labels-4096 labels-16384)

matched=matched,means=0.2
all=$matched,fetched_for=compressed
same_step=lag=0,interval=1
next_step=lag=1,interval=1
retrieval=(
    $matched
    $matched,fetch=pivot,drift=0.7,moves=spare # as the engine does
    $matched,fetch=pivot,counted=own
    $matched,fetch=pivot,counted=own,$next_step
    $matched,fetch=pivot,$same_step
    $matched,fetch=pivot,counted=own,$same_step
    $matched,fetch=pivot,counted=own,$same_step,beside=1
    $matched,fetch=pivot,counted=own,$same_step,beside=1,moves=spare
    $matched,fetch=own,counted=own
    $matched,fetch=own,counted=own,$same_step
    $all,fetch=own
    $all,fetch=own,counted=own
    $all,fetch=own,counted=shares
    $all,fetch=own,counted=own,decay=0.5
    $all,fetch=own,counted=own,$next_step
    $all,fetch=own,$same_step
    $all,fetch=own,counted=own,$same_step
    $all,fetch=offset,counted=own
    $all,fetch=offset,counted=own,$next_step
    $matched,fetch=offset,counted=own,$same_step
    $all,fetch=offset,counted=own,$same_step
    $all,fetch=mean,counted=own,$same_step
    $all,fetch=bounds,counted=own,$same_step
    $all,fetch=halves,counted=own,$same_step
)
queries=(
    $matched
    $matched,sample=mixed,elsewhere=0.25
    $matched,sample=mixed,elsewhere=0.5
    $matched,sample=mixed,elsewhere=0.5,positions=256
    $matched,sample=even,positions=256
    $matched,step=4
    $matched,step=8,positions=256
    $matched,means=0.4
    $matched,full_share=0.23  # at 5 %: one whole head of 90, then two (the default), three and four
    $matched,full_share=0.67
    $matched,full_share=0.89
)
find=$all,fetch=bits,key_bits=2
finders=(
    $matched
    $find,fetchers=8,$next_step,moves=spare # into spare pages, behind the step that asks
    $find,fetchers=4,$same_step,most=4       # as the engine does
    $find,fetchers=8,$same_step,most=4
    $find,fetchers=4,$same_step,most=2
    $find,fetchers=8,$same_step,most=2
    $find,fetchers=4,$same_step,most=8
    $find,fetchers=8,$same_step,most=8
    $find,fetchers=4,$same_step,most=4,full_share=0
    $find,fetchers=8,$same_step,most=4,full_share=0
    $all,fetch=bits,key_bits=4,fetchers=8,$same_step,most=4
    $all,fetch=own,fetchers=8,$same_step,most=4 # keys of 16 bits
    $find,fetchers=8,$same_step,most=4,counted=own
)
finder=$find,fetchers=4,$same_step,most=4
of_means=means${finder#"$matched"} # its pages, and means alone
bounds=(
    $finder # as the engine does
    $finder,bound=0.5
    $finder,bound=1
    $finder,bound=99 # half of the pages
    $finder,bound=99,share=0.35
    $finder,bound=99,share=0.25
    $finder,bound=99,share=0.15
    $of_means
)
pages=(
    $finder # by the last query, as the engine does
    $finder,pages=reference
    $finder,pages=both
    $finder,pages=largest
    $finder,pages=any,chosen_by=8
    $finder,pages=reference,chosen_by=32
    $finder,pages=reference,chosen_by=8
    $finder,pages=reference,behind=0
    $finder,pages=reference,bound=99,share=0.35
    $of_means,pages=reference
)

processes=()
for part in "${parts[@]}"; do
    length=${part#*-} chains=1
    case $part in
        prose-*) what=(--texts "${TEXTS:-4}" --methods "${retrieval[@]}") ;;
        labels-*) what=(--texts 0 --wordings station invoice --methods "${retrieval[@]}") ;;
        queries-*)
            what=(--texts "${TEXTS:-4}" --wordings station invoice register --methods "${queries[@]}")
            ;;
        finders-*)
            chains=2
            what=(--texts "${TEXTS:-4}" --wordings station invoice register --methods "${finders[@]}")
            ;;
        bounds-*)
            chains=6
            what=(--texts "${TEXTS:-18}" --wordings station invoice register --methods "${bounds[@]}")
            ;;
        pages-*)
            chains=6
            what=(--texts "${TEXTS:-18}" --wordings station invoice register --methods "${pages[@]}")
            ;;
        *) echo "retrieval.sh: there is no part $part" >&2; exit 2 ;;
    esac
    mkdir -p "$out/$part"
    python "$(dirname "$0")/matched_tokens.py" "$model" --profile "$profile" --lengths "$length" \
        --budgets "${budgets[@]}" --first-text "${FIRST_TEXT:-0}" --chains "${CHAINS:-$chains}" \
        --first-chain "${FIRST_CHAIN:-0}" --facts "${FACTS:-32}" --dtype "${DTYPE:-float32}" "${what[@]}" --out "$out/$part" \
        > "$out/$part/log" 2>&1 &
    processes+=($!)
done
failed=0
for process in "${processes[@]}"; do wait "$process" || failed=1; done
cat "$out"/*/matched_tokens_simulation.jsonl > "$out/matched_tokens_simulation.jsonl"
for part in "${parts[@]}"; do echo "# $part"; tail -n 60 "$out/$part/log" | grep '^|' || tail -n 5 "$out/$part/log"; done
exit $failed

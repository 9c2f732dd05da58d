_samrobust() {
  local line="${COMP_LINE:0:$COMP_POINT}" words="@COMMANDS@"
  local word="${line##* }"
  [ "$COMP_CWORD" -gt 1 ] && case "${COMP_WORDS[1]}" in
@CASES@
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  case "$COMP_WORDBREAKS" in
    *=*) COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}") ;;
  esac
  case "${COMPREPLY[*]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default @OPTIONS@-F _samrobust samrobust

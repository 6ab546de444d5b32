{{- define "sd.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "sd.selector" -}}
app.kubernetes.io/name: sd-server
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "sd.labels" -}}
{{ include "sd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "sd.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{- define "sd.shared" -}}
{{- if has .Values.gpu.sharing (list "mps" "timeSlicing") }}yes{{ end }}
{{- if and (eq .Values.gpu.sharing "dra") .Values.gpu.draMps }}yes{{ end }}
{{- end }}

{{/* Memory for activations in a share of the card, in MiB: 80 % of what weights and context leave. */}}
{{- define "sd.budgetMi" -}}
{{- $share := div (int .Values.gpu.memoryMi) (int .Values.gpu.replicas) -}}
{{- $left := sub (sub $share (int .Values.gpu.weightsMi)) (int .Values.gpu.contextMi) -}}
{{- if le $left 0 -}}
{{- fail (printf "gpu: a share of %d MiB has no room beside gpu.weightsMi and gpu.contextMi; fewer gpu.replicas, or a larger card" $share) -}}
{{- end -}}
{{ div (mul $left 8) 10 }}
{{- end }}

{{- define "sd.prometheusQuery" -}}
{{- $at := printf "{namespace=%q,job=%q}" .Release.Namespace (include "sd.name" .) -}}
(sum(sd_images_waiting{{ $at }}) + sum(sd_images_running{{ $at }})) / avg(sd_images_capacity{{ $at }})
{{- end }}
